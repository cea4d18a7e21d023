// Cosines of the pixels with the selected words, and their gradients, on tensor cores.
//
// Forward, one launch: a block takes 64 words by their ids and a few pixels, multiplies them as they are, adds
// up the squares of both on the way, and divides at the end. It leaves the inverse lengths for the gradients.
//
// Backward: with v the gradient of the unit vector u = x / |x|, that of x is (v - u (u v)) / |x|. A block of
// pixels makes its v twice, first for the sums u v, then to write. The words' v is a sum over pixels, cut into
// splits to fill the GPU; a last launch adds the splits and all pairs of image and class with the same word,
// in ascending order, and projects. So every number has one writer and one order of summation.
//
// Images are read as they lie, [D, P] or [P, D]; in shared memory a pixel is a row.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/device.cuh"
#include "common/mma.cuh"
#include "common/split.cuh"

namespace errseg::cost_volume {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kWords = 64, kChannels = 64;  // of a tile
constexpr double kSmallestLength = 1e-12;
constexpr float kLargestScale = 1e12f;
constexpr int kMostSplits = 16;

// Pixels of a tile. Three parts cost six products, so that blocks are smaller and more.
template <typename How>
constexpr int kPixels = How::kParts == 1 ? 32 : 16;

struct Problem {
    Numbers images;                                      // [batch] of pixels, by the strides
    int64_t image_stride, channel_stride, pixel_stride;  // one of the last two is 1
    Numbers words;                                       // rows of `channels`, `word_stride` numbers apart
    int64_t word_stride;
    const int64_t* class_ids;  // [batch, num_classes], or null for all words in order
    int batch, channels, num_pixels, num_classes;
    float* pixel_scales;  // [batch, num_pixels], inverse lengths; null when nobody wants them
    float* word_scales;   // [batch, num_classes]

    // The vector accesses that alignment allows, set by `find_alignment`.
    bool words_aligned = false, images_aligned = false;

    __host__ __device__ bool channels_last() const { return channel_stride == 1; }
    __host__ __device__ int pairs() const { return batch * num_classes; }

    void find_alignment(int pixel_neighbours) {
        words_aligned = words.aligned_to(4, word_stride);
        images_aligned = channels_last() ? images.aligned_to(4, image_stride, pixel_stride)
                                         : images.aligned_to(pixel_neighbours, image_stride, channel_stride);
    }

    // Where the word of a class lies; any place for classes beyond the last.
    __device__ __forceinline__ int64_t word_offset(int image, int k) const {
        if (k >= num_classes) return 0;
        return (class_ids ? class_ids[int64_t(image) * num_classes + k] : k) * word_stride;
    }
};

// ---- tiles

// Numbers in shared memory, in kParts parts of kRows x kColumns each; the pitch spares ldmatrix bank
// conflicts.
template <typename How, int kRows_, int kColumns_>
struct Tile {
    using Part = typename How::Part;
    static constexpr int kRows = kRows_, kColumns = kColumns_, kPitch = kColumns + 8;
    static constexpr int kPartNumbers = kRows * kPitch;
    static constexpr size_t kBytes = sizeof(Part) * How::kParts * kPartNumbers;
    Part* numbers;
};

// What a thread brings to a tile: four columns of a few rows that follow each other. The next tile waits here
// while the tensor cores work on this one.
template <typename How, int kRows, int kColumns>
struct Staged {
    using Part = typename How::Part;
    using Whole = typename How::Whole;
    static constexpr int kLanes = kColumns / 4;  // threads along a row
    static constexpr int kOwnRows = kRows * kLanes / kThreads;
    Whole values[kOwnRows][4];

    __device__ __forceinline__ static int column() { return threadIdx.x % kLanes * 4; }
    __device__ __forceinline__ static int row(int i) { return threadIdx.x / kLanes * kOwnRows + i; }

    // Rows of `columns` valid numbers that start at `from + offset(row)`; zeros beyond the first `rows`.
    template <typename T, typename Offset>
    __device__ __forceinline__ void load(const T* from, int rows, int columns, bool aligned,
                                         const Offset& offset) {
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
            const int valid = row(i) < rows ? columns - column() : 0;
            load_neighbours(values[i], from + offset(row(i)) + column(), valid, aligned);
        }
    }

    // The same where columns are contiguous and `stride` numbers apart.
    template <typename T>
    __device__ __forceinline__ void load_columns(const T* from, int64_t stride, int rows, int columns,
                                                 bool aligned) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            Whole line[kOwnRows];
            const int valid = column() + c < columns ? rows - row(0) : 0;
            load_neighbours(line, from + (column() + c) * stride + row(0), valid, aligned);
#pragma unroll
            for (int i = 0; i < kOwnRows; ++i) values[i][c] = line[i];
        }
    }

    __device__ __forceinline__ void add_squares(float (&squares)[kOwnRows]) const {
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                squares[i] = std::fma(widen(values[i][c]), widen(values[i][c]), squares[i]);
    }

    __device__ __forceinline__ void scale_row(int i, float scale) {
#pragma unroll
        for (int c = 0; c < 4; ++c) values[i][c] = narrow<Whole>(widen(values[i][c]) * scale);
    }

    __device__ __forceinline__ void store(const Tile<How, kRows, kColumns>& tile) {
        constexpr int kPitch = Tile<How, kRows, kColumns>::kPitch;
#pragma unroll
        for (int part = 0; part < How::kParts; ++part)
#pragma unroll
            for (int i = 0; i < kOwnRows; ++i) {
                uint32_t packed[2];
                take_part<Part>(packed, values[i]);
                *reinterpret_cast<uint2*>(tile.numbers + (part * kRows + row(i)) * kPitch + column()) = {
                    packed[0], packed[1]};
            }
    }
};

template <typename How>
using WordTile = Tile<How, kWords, kChannels>;
template <typename How>
using PixelTile = Tile<How, kPixels<How>, kChannels>;
template <typename How>
using GradTile = Tile<How, kWords, kPixels<How>>;
template <typename How>
using StagedWords = Staged<How, kWords, kChannels>;
template <typename How>
using StagedPixels = Staged<How, kPixels<How>, kChannels>;
template <typename How>
using StagedGrads = Staged<How, kWords, kPixels<How>>;

template <typename How>
__device__ __forceinline__ void fetch_words(StagedWords<How>& words, const Problem& p, int image,
                                            int first_word, int channel) {
    visit_number<How>(p.words.type, [&](auto number) {
        words.load(p.words.as<decltype(number)>() + channel, p.num_classes - first_word, p.channels - channel,
                   p.words_aligned, [&](int row) { return p.word_offset(image, first_word + row); });
    });
}

// Pixels from `first_pixel` up to `end`.
template <typename How>
__device__ __forceinline__ void fetch_pixels(StagedPixels<How>& pixels, const Problem& p, int image,
                                             int first_pixel, int end, int channel) {
    visit_number<How>(p.images.type, [&](auto number) {
        const auto* from = p.images.as<decltype(number)>() + image * p.image_stride +
                           first_pixel * p.pixel_stride + channel * p.channel_stride;
        const int rows = end - first_pixel, columns = p.channels - channel;
        if (p.channels_last()) {
            pixels.load(from, rows, columns, p.images_aligned, [&](int row) { return row * p.pixel_stride; });
        } else {
            pixels.load_columns(from, p.channel_stride, rows, columns, p.images_aligned);
        }
    });
}

// What comes back for some words, `grads` [batch, num_classes, num_pixels] in the images' type.
template <typename How>
__device__ __forceinline__ void fetch_grads(StagedGrads<How>& staged, const Problem& p, const void* grads,
                                            bool aligned, int image, int first_word, int first_pixel,
                                            int end) {
    visit_number<How>(p.images.type, [&](auto number) {
        const int64_t first = (int64_t(image) * p.num_classes + first_word) * p.num_pixels + first_pixel;
        staged.load(static_cast<const decltype(number)*>(grads) + first, p.num_classes - first_word,
                    end - first_pixel, aligned, [&](int row) { return int64_t(row) * p.num_pixels; });
    });
}

// sums[m][n] += left right for a warp's 16 kLeft rows from `left_row` on and 8 kRight columns from
// `right_column` on. The left tile holds its operand by rows, or transposed; the right one by columns, or
// transposed.
template <typename How, bool kLeftTransposed, bool kRightTransposed, int kLeft, int kRight, typename LeftTile,
          typename RightTile>
__device__ __forceinline__ void multiply(float (&sums)[kLeft][kRight][4], const LeftTile& left_tile,
                                         int left_row, const RightTile& right_tile, int right_column) {
    using Part = typename How::Part;
    constexpr int kParts = How::kParts;
    constexpr int kDepth = kLeftTransposed ? LeftTile::kRows : LeftTile::kColumns;
    static_assert(kDepth == (kRightTransposed ? RightTile::kRows : RightTile::kColumns) && kRight % 2 == 0);
    constexpr int kLeftPitch = LeftTile::kPitch, kRightPitch = RightTile::kPitch;
    const int lane = threadIdx.x % kWarpSize, row = lane % 8, odd = lane / 8 % 2 * 8, high = lane / 16 * 8;
    const Part* left = left_tile.numbers + (kLeftTransposed ? (row + high) * kLeftPitch + odd + left_row
                                                            : (row + odd + left_row) * kLeftPitch + high);
    const Part* right =
        right_tile.numbers + (kRightTransposed ? (row + odd) * kRightPitch + high + right_column
                                               : (row + high + right_column) * kRightPitch + odd);
#pragma unroll(kParts == 1 ? kDepth / 16 : 1)
    for (int depth = 0; depth < kDepth; depth += 16) {
        uint32_t a[kParts][kLeft][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int m = 0; m < kLeft; ++m)
                ldmatrix<4, kLeftTransposed>(a[part][m], left + part * LeftTile::kPartNumbers +
                                                             (kLeftTransposed ? depth * kLeftPitch + m * 16
                                                                              : m * 16 * kLeftPitch + depth));
#pragma unroll
        for (int n = 0; n < kRight; n += 2) {
            uint32_t b[kParts][4];
#pragma unroll
            for (int part = 0; part < kParts; ++part)
                ldmatrix<4, kRightTransposed>(b[part], right + part * RightTile::kPartNumbers +
                                                           (kRightTransposed ? depth * kRightPitch + n * 8
                                                                             : n * 8 * kRightPitch + depth));
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                // Tensor cores cut off what does not fit a sum, so long sums are kept outside of them.
                float fresh[kLeft][4] = {};
#pragma unroll
                for (int order = kParts - 1; order >= 0; --order)  // the small products first
#pragma unroll
                    for (int part = order; part >= 0; --part)
#pragma unroll
                        for (int m = 0; m < kLeft; ++m) {
                            const uint32_t y[2] = {b[order - part][2 * h], b[order - part][2 * h + 1]};
                            mma_m16n8k16<Part>(fresh[m], a[part][m], y);
                        }
#pragma unroll
                for (int m = 0; m < kLeft; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[m][n + h][i] += fresh[m][i];
            }
        }
    }
}

// Row and column of a warp's sum `i` of four.
__device__ __forceinline__ int sum_row(int i) {
    return threadIdx.x % kWarpSize / 4 + i / 2 * 8;
}
__device__ __forceinline__ int sum_column(int i) {
    return threadIdx.x % 4 * 2 + i % 2;
}

// The first `valid` of two neighbours; in one access where `aligned` allows it.
template <typename T>
__device__ __forceinline__ void store_two(T* to, float low, float high, int valid, bool aligned) {
    if (aligned && valid >= 2) {
        *reinterpret_cast<Neighbours<T, 2>*>(to) = {narrow<T>(low), narrow<T>(high)};
    } else {
        if (valid >= 1) to[0] = narrow<T>(low);
        if (valid >= 2) to[1] = narrow<T>(high);
    }
}

// ---- forward

__device__ __forceinline__ float inverse_length(float squares) {
    const double length = std::sqrt(static_cast<double>(squares));
    return static_cast<float>(1.0 / (length > kSmallestLength ? length : kSmallestLength));
}

// What to take off per unit of the vector; a length that is clamped does not move with its vector.
__device__ __forceinline__ float projection(float along, float scale) {
    return scale < kLargestScale ? along * scale * scale : 0.0f;
}

// The scales of a tile's rows, each from the squares that the threads along the row have seen.
template <int kLanes, int kOwnRows>
__device__ __forceinline__ void store_scales(float* scales, const float (&squares)[kOwnRows]) {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
        const float scale = inverse_length(warp_sum<kLanes>(squares[i]));
        if (threadIdx.x % kLanes == 0) scales[threadIdx.x / kLanes * kOwnRows + i] = scale;
    }
}

template <typename How>
struct ForwardShared {
    WordTile<How> words;
    PixelTile<How> pixels;
    float *word_scales, *pixel_scales;
    static constexpr size_t kBytes =
        WordTile<How>::kBytes + PixelTile<How>::kBytes + sizeof(float) * (kWords + kPixels<How>);

    __device__ explicit ForwardShared(char* memory)
        : words{reinterpret_cast<typename How::Part*>(memory)},
          pixels{reinterpret_cast<typename How::Part*>(memory + WordTile<How>::kBytes)},
          word_scales(reinterpret_cast<float*>(memory + WordTile<How>::kBytes + PixelTile<How>::kBytes)),
          pixel_scales(word_scales + kWords) {}
};

// `costs` [batch, num_classes, num_pixels] in the images' type. Grid: tiles of pixels, tiles of words.
template <typename How>
__global__ void __launch_bounds__(kThreads) cost_volume_fwd_kernel(Problem p, void* costs) {
    constexpr int kTilePixels = kPixels<How>;
    const ForwardShared<How> shared(dynamic_shared());
    const int tiles = ceil_div(p.num_pixels, kTilePixels), image = blockIdx.x / tiles;
    const int first_pixel = (blockIdx.x - image * tiles) * kTilePixels, first_word = blockIdx.y * kWords;
    StagedWords<How> words;
    StagedPixels<How> pixels;
    const auto fetch = [&](int channel) {
        fetch_words<How>(words, p, image, first_word, channel);
        fetch_pixels<How>(pixels, p, image, first_pixel, p.num_pixels, channel);
    };
    const int warp = threadIdx.x / kWarpSize;
    float sums[1][kTilePixels / 8][4] = {};
    float word_squares[StagedWords<How>::kOwnRows] = {}, pixel_squares[StagedPixels<How>::kOwnRows] = {};
    fetch(0);
    for (int channel = 0; channel < p.channels; channel += kChannels) {
        words.add_squares(word_squares), pixels.add_squares(pixel_squares);
        __syncthreads();
        words.store(shared.words), pixels.store(shared.pixels);
        __syncthreads();
        if (channel + kChannels < p.channels) fetch(channel + kChannels);
        multiply<How, false, false>(sums, shared.words, warp * 16, shared.pixels, 0);
    }
    store_scales<StagedWords<How>::kLanes>(shared.word_scales, word_squares);
    store_scales<StagedPixels<How>::kLanes>(shared.pixel_scales, pixel_squares);
    __syncthreads();

    const int num_words = min(kWords, p.num_classes - first_word);
    const int num_pixels = min(kTilePixels, p.num_pixels - first_pixel);
    visit_number<How>(p.images.type, [&](auto number) {
        using T = decltype(number);
        T* out = static_cast<T*>(costs) + (int64_t(image) * p.num_classes + first_word) * p.num_pixels +
                 first_pixel;
#pragma unroll
        for (int n = 0; n < kTilePixels / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const int row = warp * 16 + sum_row(i), column = n * 8 + sum_column(i);
                const float scale = shared.word_scales[row];
                store_two(out + int64_t(row) * p.num_pixels + column,
                          sums[0][n][i] * scale * shared.pixel_scales[column],
                          sums[0][n][i + 1] * scale * shared.pixel_scales[column + 1],
                          row < num_words ? num_pixels - column : 0, p.num_pixels % 2 == 0);
            }
    });
    if (!p.pixel_scales) return;
    if (blockIdx.y == 0 && int(threadIdx.x) < num_pixels)
        p.pixel_scales[int64_t(image) * p.num_pixels + first_pixel + threadIdx.x] =
            shared.pixel_scales[threadIdx.x];
    if (first_pixel == 0 && int(threadIdx.x) < num_words)
        p.word_scales[int64_t(image) * p.num_classes + first_word + threadIdx.x] =
            shared.word_scales[threadIdx.x];
}

// ---- gradients of the pixels

// The pixels of a tile as they are, one row each, for arithmetic outside of the tensor cores.
template <typename How>
struct PlainPixels {
    using Whole = typename How::Whole;
    static constexpr int kPitch = kChannels + 16 / sizeof(Whole);
    static constexpr size_t kBytes = sizeof(Whole) * kPixels<How> * kPitch;
    Whole* numbers;

    __device__ __forceinline__ void store(const StagedPixels<How>& staged) const {
#pragma unroll
        for (int i = 0; i < staged.kOwnRows; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                numbers[staged.row(i) * kPitch + staged.column() + c] = staged.values[i][c];
    }
    __device__ __forceinline__ float at(int pixel, int channel) const {
        return widen(numbers[pixel * kPitch + channel]);
    }
};

template <typename How>
struct PixelGradShared {
    WordTile<How> words;
    GradTile<How> grads;
    PlainPixels<How> pixels;
    float* along;  // [kWarps][kPixels]
    static constexpr size_t kBytes = WordTile<How>::kBytes + GradTile<How>::kBytes +
                                     PlainPixels<How>::kBytes + sizeof(float) * kWarps * kPixels<How>;

    __device__ explicit PixelGradShared(char* memory)
        : words{reinterpret_cast<typename How::Part*>(memory)},
          grads{reinterpret_cast<typename How::Part*>(memory + WordTile<How>::kBytes)},
          pixels{
              reinterpret_cast<typename How::Whole*>(memory + WordTile<How>::kBytes + GradTile<How>::kBytes)},
          along(reinterpret_cast<float*>(memory + kBytes - sizeof(float) * kWarps * kPixels<How>)) {}
};

// `grads` as costs, `pixel_grads` [batch, channels, num_pixels] in the images' type. Grid: tiles of pixels.
template <typename How>
__global__ void __launch_bounds__(kThreads)
    cost_volume_bwd_pixels_kernel(Problem p, const void* grads, bool grads_aligned, void* pixel_grads) {
    constexpr int kTilePixels = kPixels<How>, kColumns = kTilePixels / 8;
    const PixelGradShared<How> shared(dynamic_shared());
    const int tiles = ceil_div(p.num_pixels, kTilePixels), image = blockIdx.x / tiles;
    const int first_pixel = (blockIdx.x - image * tiles) * kTilePixels;
    const int num_pixels = min(kTilePixels, p.num_pixels - first_pixel), warp = threadIdx.x / kWarpSize;
    const int word_tiles = ceil_div(p.num_classes, kWords), channel_tiles = ceil_div(p.channels, kChannels);

    float scales[kColumns][2], projections[kColumns][2];  // of this thread's pixels
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int pixel = n * 8 + sum_column(i);
            scales[n][i] = pixel < num_pixels
                               ? p.pixel_scales[int64_t(image) * p.num_pixels + first_pixel + pixel]
                               : 0.0f;
            projections[n][i] = 0.0f;
        }

    // A step is a tile of words in a tile of channels, all of them once to project and once to write.
    StagedWords<How> words;
    StagedPixels<How> pixels;
    StagedGrads<How> staged_grads;
    const auto fetch = [&](int step) {
        const int first_word = step % word_tiles * kWords;
        const int channel = step / word_tiles % channel_tiles * kChannels;
        fetch_words<How>(words, p, image, first_word, channel);
        if (first_word == 0) fetch_pixels<How>(pixels, p, image, first_pixel, p.num_pixels, channel);
        if (step == 0 || word_tiles > 1)
            fetch_grads<How>(staged_grads, p, grads, grads_aligned, image, first_word, first_pixel,
                             p.num_pixels);
    };
    float sums[1][kColumns][4] = {};
    const int steps = 2 * word_tiles * channel_tiles;
    fetch(0);
    for (int step = 0; step < steps; ++step) {
        const int word_tile = step % word_tiles, channel_tile = step / word_tiles % channel_tiles;
#pragma unroll
        for (int i = 0; i < words.kOwnRows; ++i) {
            const int k = word_tile * kWords + words.row(i);
            if (k < p.num_classes) words.scale_row(i, p.word_scales[int64_t(image) * p.num_classes + k]);
        }
        __syncthreads();
        words.store(shared.words);
        if (word_tile == 0) shared.pixels.store(pixels);
        if (step == 0 || word_tiles > 1) staged_grads.store(shared.grads);
        __syncthreads();
        if (step + 1 < steps) fetch(step + 1);
        multiply<How, true, true>(sums, shared.words, warp * 16, shared.grads, 0);
        if (word_tile < word_tiles - 1) continue;

        const bool writing = step >= steps / 2;
        visit_number<How>(p.images.type, [&](auto number) {
            using T = decltype(number);
            T* out = static_cast<T*>(pixel_grads) + int64_t(image) * p.channels * p.num_pixels + first_pixel;
#pragma unroll
            for (int n = 0; n < kColumns; ++n)
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    const int row = warp * 16 + sum_row(i), channel = channel_tile * kChannels + row;
                    const int column = n * 8 + sum_column(i);
                    float grads[2];
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const float pixel = shared.pixels.at(column + c, row), sum = sums[0][n][i + c];
                        grads[c] = (sum - pixel * projections[n][c]) * scales[n][c];
                        if (!writing) projections[n][c] = std::fma(sum, pixel, projections[n][c]);
                        sums[0][n][i + c] = 0.0f;
                    }
                    const int valid = writing && channel < p.channels ? num_pixels - column : 0;
                    store_two(out + int64_t(channel) * p.num_pixels + column, grads[0], grads[1], valid,
                              p.num_pixels % 2 == 0);
                }
        });
        if (step != steps / 2 - 1) continue;

        // Lanes of four and all warps have seen other channels of the same pixel.
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float along = projections[n][i];
#pragma unroll
                for (int bits = 4; bits < kWarpSize; bits *= 2)
                    along += __shfl_xor_sync(kFullWarp, along, bits);
                if (threadIdx.x % kWarpSize < 4)
                    shared.along[warp * kTilePixels + n * 8 + sum_column(i)] = along;
            }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float along = 0.0f;
#pragma unroll
                for (int w = 0; w < kWarps; ++w)
                    along += shared.along[w * kTilePixels + n * 8 + sum_column(i)];
                projections[n][i] = projection(along, scales[n][i]);
            }
    }
}

// ---- gradients of the words

// How the sum over pixels is cut.
struct Splits {
    int pixels, count;

    template <typename How>
    static Splits make(const Problem& p, int multiprocessors) {
        const int tiles = ceil_div(p.num_pixels, kPixels<How>);
        const int64_t blocks =
            int64_t(p.batch) * ceil_div(p.channels, kChannels) * ceil_div(p.num_classes, kWords);
        const int most = std::min(tiles, kMostSplits);
        const int wanted = std::clamp<int64_t>(multiprocessors / std::max<int64_t>(blocks, 1), 1, most);
        const int pixels = ceil_div(tiles, wanted) * kPixels<How>;
        return {pixels, ceil_div(p.num_pixels, pixels)};
    }
};

template <typename How>
struct WordGradShared {
    GradTile<How> grads;
    PixelTile<How> pixels;
    static constexpr size_t kBytes = GradTile<How>::kBytes + PixelTile<How>::kBytes;

    __device__ explicit WordGradShared(char* memory)
        : grads{reinterpret_cast<typename How::Part*>(memory)},
          pixels{reinterpret_cast<typename How::Part*>(memory + GradTile<How>::kBytes)} {}
};

// `unit_grads` [batch, num_classes, splits, channels], of the words' unit vectors. Grid: tiles of channels times
// splits, tiles of words, images.
template <typename How>
__global__ void __launch_bounds__(kThreads)
    cost_volume_bwd_words_kernel(Problem p, Splits splits, const void* grads, bool grads_aligned,
                                 float* unit_grads) {
    constexpr int kAcross = 2;  // warps along the channels; the others are along the words
    constexpr int kLeft = kWords / 16 / (kWarps / kAcross), kRight = kChannels / 8 / kAcross;
    const WordGradShared<How> shared(dynamic_shared());
    const int channel_tiles = ceil_div(p.channels, kChannels), split = blockIdx.x / channel_tiles;
    const int first_channel = (blockIdx.x - split * channel_tiles) * kChannels;
    const int first_word = blockIdx.y * kWords, image = blockIdx.z;
    const int begin = split * splits.pixels, end = min(begin + splits.pixels, p.num_pixels);
    StagedGrads<How> staged_grads;
    StagedPixels<How> pixels;
    const auto fetch = [&](int first_pixel) {
        fetch_grads<How>(staged_grads, p, grads, grads_aligned, image, first_word, first_pixel, end);
        fetch_pixels<How>(pixels, p, image, first_pixel, end, first_channel);
    };
    const int warp = threadIdx.x / kWarpSize;
    const int warp_word = warp / kAcross * kLeft * 16, warp_channel = warp % kAcross * kRight * 8;
    float sums[kLeft][kRight][4] = {};
    fetch(begin);
    for (int first_pixel = begin; first_pixel < end; first_pixel += kPixels<How>) {
#pragma unroll
        for (int i = 0; i < pixels.kOwnRows; ++i) {
            const int pixel = first_pixel + pixels.row(i);
            if (pixel < end) pixels.scale_row(i, p.pixel_scales[int64_t(image) * p.num_pixels + pixel]);
        }
        __syncthreads();
        staged_grads.store(shared.grads), pixels.store(shared.pixels);
        __syncthreads();
        if (first_pixel + kPixels<How> < end) fetch(first_pixel + kPixels<How>);
        multiply<How, false, true>(sums, shared.grads, warp_word, shared.pixels, warp_channel);
    }
#pragma unroll
    for (int m = 0; m < kLeft; ++m)
#pragma unroll
        for (int n = 0; n < kRight; ++n)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const int k = first_word + warp_word + m * 16 + sum_row(i);
                const int channel = first_channel + warp_channel + n * 8 + sum_column(i);
                const int64_t pair = int64_t(image) * p.num_classes + k;
                store_two(unit_grads + (pair * splits.count + split) * p.channels + channel, sums[m][n][i],
                          sums[m][n][i + 1], k < p.num_classes ? p.channels - channel : 0,
                          p.channels % 2 == 0);
            }
}

// For every pair of image and class the next one with the same word, `pairs` behind the last, and whether it is
// the first.
__global__ void __launch_bounds__(kThreads)
    cost_volume_bwd_order_kernel(const int64_t* class_ids, int pairs, int* following, int* leading) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= pairs) return;
    const int64_t id = class_ids[i];
    int after = pairs, before = 0;
    for (int j = 0; j < pairs; ++j) {
        const bool same = class_ids[j] == id;
        if (same && j > i) after = min(after, j);
        if (same && j < i) before = 1;
    }
    following[i] = after, leading[i] = !before;
}

// `word_grads` [words, channels] in the words' type; rows of words that were not selected stay as they are.
// Grid: pairs, or all words.
__global__ void __launch_bounds__(kThreads)
    cost_volume_bwd_sum_kernel(Problem p, int splits, const float* unit_grads, const int* following,
                               const int* leading, void* word_grads) {
    __shared__ float warp_sums[kWarps];
    const int first = blockIdx.x;
    if (p.class_ids && !leading[first]) return;
    const int64_t word = p.class_ids ? p.class_ids[first] : first;
    const auto total = [&](int channel) {
        float sum = 0.0f;
        for (int pair = first; pair < p.pairs(); pair = p.class_ids ? following[pair] : pair + p.num_classes)
            for (int split = 0; split < splits; ++split)
                sum += unit_grads[(int64_t(pair) * splits + split) * p.channels + channel];
        return sum;
    };
    visit_number<Split<float, 3>>(p.words.type, [&](auto number) {
        using T = decltype(number);
        const T* from = p.words.as<T>() + word * p.word_stride;
        T* out = static_cast<T*>(word_grads) + word * p.channels;
        float along = 0.0f;
        for (int channel = threadIdx.x; channel < p.channels; channel += kThreads)
            along = std::fma(total(channel), widen(from[channel]), along);
        along = warp_sum(along);
        if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = along;
        __syncthreads();
        along = 0.0f;
        for (int warp = 0; warp < kWarps; ++warp) along += warp_sums[warp];
        const float scale = p.word_scales[first], share = projection(along, scale);
        for (int channel = threadIdx.x; channel < p.channels; channel += kThreads)
            out[channel] = narrow<T>((total(channel) - widen(from[channel]) * share) * scale);
    });
}

// ---- launches; all of them need at least one pair, pixel and channel

// Calls `body(How{})` with what the types of the problem need.
template <typename Body>
auto visit_split(const Problem& p, const Body& body) {
    if (p.images.type == p.words.type && p.images.type == Number::kBFloat16) return body(Split<bf16, 1>{});
    if (p.images.type == p.words.type && p.images.type == Number::kFloat16) return body(Split<half, 1>{});
    return body(Split<bf16, 3>{});
}

inline cudaError_t forward(Problem p, void* costs, cudaStream_t stream) {
    return visit_split(p, [&](auto how) {
        using How = decltype(how);
        p.find_alignment(StagedPixels<How>::kOwnRows);
        const dim3 grid(p.batch * ceil_div(p.num_pixels, kPixels<How>), ceil_div(p.num_classes, kWords));
        return launch(cost_volume_fwd_kernel<How>, grid, kThreads, ForwardShared<How>::kBytes, stream, p,
                      costs);
    });
}

inline bool grads_aligned(const Problem& p, const void* grads) {
    return Numbers{grads, p.images.type}.aligned_to(4, p.num_pixels);
}

inline cudaError_t backward_pixels(Problem p, const void* grads, void* pixel_grads, cudaStream_t stream) {
    return visit_split(p, [&](auto how) {
        using How = decltype(how);
        p.find_alignment(StagedPixels<How>::kOwnRows);
        return launch(cost_volume_bwd_pixels_kernel<How>, p.batch * ceil_div(p.num_pixels, kPixels<How>),
                      kThreads, PixelGradShared<How>::kBytes, stream, p, grads, grads_aligned(p, grads),
                      pixel_grads);
    });
}

inline Splits make_splits(const Problem& p, int multiprocessors) {
    return visit_split(p, [&](auto how) { return Splits::make<decltype(how)>(p, multiprocessors); });
}

// Scratch: `unit_grads` [pairs, splits, channels]; with class ids `order` [2, pairs].
inline cudaError_t backward_words(Problem p, Splits splits, const void* grads, float* unit_grads, int* order,
                                  void* word_grads, cudaStream_t stream) {
    cudaError_t error = visit_split(p, [&](auto how) {
        using How = decltype(how);
        p.find_alignment(StagedPixels<How>::kOwnRows);
        const dim3 grid(ceil_div(p.channels, kChannels) * splits.count, ceil_div(p.num_classes, kWords),
                        p.batch);
        return launch(cost_volume_bwd_words_kernel<How>, grid, kThreads, WordGradShared<How>::kBytes, stream,
                      p, splits, grads, grads_aligned(p, grads), unit_grads);
    });
    if (error != cudaSuccess) return error;
    int* following = nullptr;
    int* leading = nullptr;
    if (p.class_ids) {
        following = order, leading = order + p.pairs();
        error = launch(cost_volume_bwd_order_kernel, ceil_div(p.pairs(), kThreads), kThreads, 0, stream,
                       p.class_ids, p.pairs(), following, leading);
        if (error != cudaSuccess) return error;
    }
    return launch(cost_volume_bwd_sum_kernel, p.class_ids ? p.pairs() : p.num_classes, kThreads, 0, stream, p,
                  splits.count, unit_grads, following, leading, word_grads);
}

}  // namespace errseg::cost_volume
