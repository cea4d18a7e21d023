// Votes of the pixels for the words: a matrix product whose results never leave the registers' neighbourhood.
//
// Words and pixels are packed into panels; a kernel multiplies one panel of words by one of pixels and merges
// the products into the three best words of each pixel. Every product is summed in the same order, wherever
// its word stands, so that equal words tie exactly; words go by in ascending order, so that ties are left to
// the lowest id.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/simd.h"
#include "common/stable.h"

namespace errseg {
namespace {

constexpr int64_t kRanks = 3;
constexpr int64_t kVotes[kRanks] = {100, 10, 1};
// Packed words that a thread goes through its pixels with (second cache), and that all threads share before
// they wait for each other; packed pixels at a time.
constexpr int64_t kBlockBytes = 384 << 10, kWordBytes = 8 << 20, kPixelBytes = 16 << 20;
constexpr double kSmallestNorm = 1e-12;

template <typename S>
using Id = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;

/// S[N], computed with element by element.
template <typename S, int kBytes>
struct Vector {
    typedef S Type __attribute__((vector_size(kBytes), may_alias, aligned(sizeof(S))));
    typedef Id<S> Ids __attribute__((vector_size(kBytes), may_alias, aligned(sizeof(S))));
    static constexpr int kLanes = kBytes / static_cast<int>(sizeof(S));
};

/// Where a panel of pixels keeps its best words: kRanks rows of scores, and of ids.
template <typename S>
struct Best {
    S* scores;
    Id<S>* ids;
};

/// One panel of kWords words by one of two vectors of pixels; `words` [depth, kWords], `pixels` [depth,
/// pixels].
template <typename S, int kBytes, int kWords>
ERRSEG_INLINE void multiply_and_merge(const S* words, const S* pixels, int64_t depth, Id<S> first_id,
                                      int64_t num_words, Best<S> best) {
    using V = typename Vector<S, kBytes>::Type;
    using I = typename Vector<S, kBytes>::Ids;
    constexpr int kLanes = Vector<S, kBytes>::kLanes, kPixels = 2 * kLanes;
    V left[kWords] = {}, right[kWords] = {};
    for (int64_t d = 0; d < depth; ++d) {
        const V p = *reinterpret_cast<const V*>(pixels), q = *reinterpret_cast<const V*>(pixels + kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kWords; ++i) {
            left[i] += words[i] * p;
            right[i] += words[i] * q;
        }
        words += kWords;
        pixels += kPixels;
    }
    for (int half = 0; half < 2; ++half) {
        const V* products = half ? right : left;
        V* scores[kRanks];
        I* ids[kRanks];
        for (int r = 0; r < kRanks; ++r) {
            scores[r] = reinterpret_cast<V*>(best.scores + r * kPixels + half * kLanes);
            ids[r] = reinterpret_cast<I*>(best.ids + r * kPixels + half * kLanes);
        }
        V largest = products[0];
        for (int i = 1; i < kWords; ++i) largest = products[i] > largest ? products[i] : largest;
        const I beats = largest > *scores[2];
        Id<S> any = 0;
        for (int lane = 0; lane < kLanes; ++lane) any |= beats[lane];
        if (!any) continue;
        V s0 = *scores[0], s1 = *scores[1], s2 = *scores[2];
        I i0 = *ids[0], i1 = *ids[1], i2 = *ids[2];
        for (int64_t i = 0; i < num_words; ++i) {
            const V product = products[i];
            const I id = I{} + static_cast<Id<S>>(first_id + i);
            const I first = product > s0, second = product > s1, third = product > s2;
            s2 = second ? s1 : (third ? product : s2);
            i2 = second ? i1 : (third ? id : i2);
            s1 = first ? s0 : (second ? product : s1);
            i1 = first ? i0 : (second ? id : i1);
            s0 = first ? product : s0;
            i0 = first ? id : i0;
        }
        *scores[0] = s0, *scores[1] = s1, *scores[2] = s2;
        *ids[0] = i0, *ids[1] = i1, *ids[2] = i2;
    }
}

/// The kernel for an instruction set, and the widths of its panels.
template <typename S>
struct Kernel {
    void (*run)(const S* words, const S* pixels, int64_t depth, Id<S> first_id, int64_t num_words,
                Best<S> best);
    int64_t words, pixels;
};

template <typename S>
void baseline(const S* words, const S* pixels, int64_t depth, Id<S> first_id, int64_t num_words,
              Best<S> best) {
    multiply_and_merge<S, 16, 6>(words, pixels, depth, first_id, num_words, best);
}

#if defined(__x86_64__) && defined(__GNUC__)
template <typename S>
__attribute__((target("avx2,fma"))) void avx2(const S* words, const S* pixels, int64_t depth, Id<S> first_id,
                                              int64_t num_words, Best<S> best) {
    multiply_and_merge<S, 32, 6>(words, pixels, depth, first_id, num_words, best);
}

template <typename S>
__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))) void avx512(
    const S* words, const S* pixels, int64_t depth, Id<S> first_id, int64_t num_words, Best<S> best) {
    multiply_and_merge<S, 64, 12>(words, pixels, depth, first_id, num_words, best);
}
#endif

template <typename S>
Kernel<S> choose_kernel() {
    constexpr int64_t size = sizeof(S);
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        return {avx512<S>, 12, 128 / size};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {avx2<S>, 6, 64 / size};
#endif
    return {baseline<S>, 6, 32 / size};
}

/// A word [depth], normalised, into a column of a panel.
template <typename S>
void pack_word(const S* word, int64_t depth, int64_t stride, S* panel) {
    double squares = 0.;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < depth; ++d)
        squares += static_cast<double>(word[d]) * static_cast<double>(word[d]);
    const S norm = static_cast<S>(std::max(std::sqrt(squares), kSmallestNorm));
    for (int64_t d = 0; d < depth; ++d) panel[d * stride] = word[d] / norm;
}

/// Rounds up to whole panels.
int64_t panels_of(int64_t count, int64_t width) {
    return (count + width - 1) / width;
}

template <typename S>
class Ballot {
  public:
    /// Images [B, D, H, W], or [B, H, W, D] with the channels last.
    Ballot(const Tensor& images, bool channels_last, const Tensor& words)
        : images_(images),
          words_(words),
          channels_last_(channels_last),
          read_image_(reader<S>(images, "image_embeddings")),
          read_words_(reader<S>(words, "text_embeddings")),
          batch_(images.size(0)),
          depth_(words.size(1)),
          num_pixels_(images.size(channels_last ? 1 : 2) * images.size(channels_last ? 2 : 3)),
          num_words_(words.size(0)),
          word_stride_(words.stride(0)),
          panels_per_image_(panels_of(num_pixels_, kernel_.pixels)) {}

    void run(int64_t* votes) const {
        const int64_t panel_size = std::max<int64_t>(1, depth_ * kernel_.pixels),
                      total = batch_ * panels_per_image_;
        const int64_t at_once = std::min(
            total, std::max<int64_t>(1, kPixelBytes / (panel_size * static_cast<int64_t>(sizeof(S)))));
        std::vector<S> pixels(at_once * panel_size), scores(at_once * kRanks * kernel_.pixels);
        std::vector<Id<S>> ids(scores.size());
        for (int64_t start = 0; start < total; start += at_once) {
            const int64_t panels = std::min(at_once, total - start);
            pack(start, panels, pixels.data());
            std::fill(scores.begin(), scores.end(), -std::numeric_limits<S>::infinity());
            std::fill(ids.begin(), ids.end(), Id<S>(-1));
            rank(panels, pixels.data(), {scores.data(), ids.data()});
            count(start, panels, ids.data(), votes);
        }
    }

  private:
    void pack(int64_t start, int64_t panels, S* packed) const {
        torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t b = (start + i) / panels_per_image_, p = first_pixel(start + i);
                S* panel = packed + i * depth_ * kernel_.pixels;
                if (channels_last_)
                    pack_pixels(b * num_pixels_ + p, width_at(p), panel);
                else
                    pack_maps(b * depth_ * num_pixels_ + p, width_at(p), panel);
            }
        });
    }

    /// `n` pixels, of which the first stands at `first` in the first map, into a panel [depth, pixels].
    void pack_maps(int64_t first, int64_t n, S* panel) const {
        for (int64_t d = 0; d < depth_; ++d, panel += kernel_.pixels) {
            read_image_(images_, first + d * num_pixels_, n, panel);
            std::fill(panel + n, panel + kernel_.pixels, S(0));
        }
    }

    /// `n` pixels from the one numbered `first` on.
    void pack_pixels(int64_t first, int64_t n, S* panel) const {
        std::vector<S> pixel(depth_);
        for (int64_t k = 0; k < kernel_.pixels; ++k) {
            if (k < n)
                read_image_(images_, (first + k) * depth_, depth_, pixel.data());
            else
                std::fill(pixel.begin(), pixel.end(), S(0));
            for (int64_t d = 0; d < depth_; ++d) panel[d * kernel_.pixels + k] = pixel[d];
        }
    }

    void rank(int64_t panels, const S* pixels, Best<S> best) const {
        const int64_t panel_bytes =
            std::max<int64_t>(1, depth_ * kernel_.words * static_cast<int64_t>(sizeof(S)));
        const int64_t tile = std::max<int64_t>(1, kWordBytes / panel_bytes);  // panels of words
        const int64_t block = std::max<int64_t>(1, kBlockBytes / panel_bytes);
        const int64_t num_panels = panels_of(num_words_, kernel_.words);
        std::vector<S> packed(std::min(tile, num_panels) * depth_ * kernel_.words);
        for (int64_t first = 0; first < num_panels; first += tile) {
            const int64_t count = std::min(tile, num_panels - first);
            torch::stable::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i)
                    pack_words(first + i, &packed[i * depth_ * kernel_.words]);
            });
            torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
                for (int64_t i = 0; i < count; i += block)
                    for (int64_t j = begin; j < end; ++j)
                        for (int64_t k = i; k < std::min(i + block, count); ++k)
                            merge(first + k, packed.data() + k * depth_ * kernel_.words,
                                  pixels + j * depth_ * kernel_.pixels, j * kRanks * kernel_.pixels, best);
            });
        }
    }

    void merge(int64_t panel, const S* words, const S* pixels, int64_t state, Best<S> best) const {
        const int64_t id = panel * kernel_.words, n = std::min(kernel_.words, num_words_ - id);
        kernel_.run(words, pixels, depth_, static_cast<Id<S>>(id), n,
                    {best.scores + state, best.ids + state});
    }

    void pack_words(int64_t panel, S* packed) const {
        std::vector<S> word(depth_);
        for (int64_t i = 0; i < kernel_.words; ++i) {
            const int64_t id = panel * kernel_.words + i;
            if (id < num_words_)
                read_words_(words_, id * word_stride_, depth_, word.data());
            else
                std::fill(word.begin(), word.end(), S(0));
            pack_word(word.data(), depth_, kernel_.words, packed + i);
        }
    }

    void count(int64_t start, int64_t panels, const Id<S>* ids, int64_t* votes) const {
        for (int64_t i = 0; i < panels; ++i) {
            int64_t* of_image = votes + (start + i) / panels_per_image_ * num_words_;
            const int64_t width = width_at(first_pixel(start + i));
            for (int64_t r = 0; r < kRanks; ++r)
                for (int64_t p = 0; p < width; ++p) {
                    const Id<S> id = ids[(i * kRanks + r) * kernel_.pixels + p];
                    if (id >= 0) of_image[id] += kVotes[r];  // fewer words than ranks leave some without
                }
        }
    }

    int64_t first_pixel(int64_t panel) const { return panel % panels_per_image_ * kernel_.pixels; }
    int64_t width_at(int64_t pixel) const { return std::min(kernel_.pixels, num_pixels_ - pixel); }

    const Kernel<S> kernel_ = choose_kernel<S>();
    const Tensor &images_, &words_;
    const bool channels_last_;
    const Reader<S> read_image_, read_words_;
    const int64_t batch_, depth_, num_pixels_, num_words_, word_stride_, panels_per_image_;
};

Tensor class_votes_cpu(const Tensor& images_in, const Tensor& words_in) {
    expect(images_in.dim() == 4, "image_embeddings [B, D, H, W]", images_in);
    expect(words_in.dim() == 2 && words_in.size(1) == images_in.size(1), "text_embeddings [T, D]", words_in);
    const Tensor pixels = torch::stable::transpose(torch::stable::transpose(images_in, 1, 2), 2, 3);
    const bool channels_last = pixels.is_contiguous();  // as the backbone lays them out
    const Tensor images = channels_last ? pixels : as_contiguous(images_in);
    const Tensor words = with_contiguous_rows(words_in);
    STD_TORCH_CHECK(words.size(0) < std::numeric_limits<int32_t>::max() - 64,
                    "too many words: ", words.size(0));
    Tensor votes = torch::stable::new_zeros(images, {images.size(0), words.size(0)}, ScalarType::Long);
    if (images.numel() == 0 && words.size(1) > 0) return votes;
    visit_score(images, [&](auto tag) {
        using S = typename decltype(tag)::type;
        Ballot<S>(images, channels_last, words).run(mutable_data<int64_t>(votes));
    });
    return votes;
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CPU, m) {
    m.impl("class_votes_cpu", TORCH_BOX(&errseg::class_votes_cpu));
}
