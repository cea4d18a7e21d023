// Depthwise convolution of token-major maps, and its gradients.
//
// A task takes as many channels as a vector holds through some rows of one map. The k rows that a row of
// outputs needs stand in a ring in the first cache, converted and padded with zeros; an input that is loaded
// from there serves up to k outputs in registers. The backward pass walks over the incoming gradient in the
// same way: the gradient of the input is the convolution with the window turned round, and for the gradient
// of the window each task gathers the products of the ring with the inputs at its centre. Tasks depend on the
// shapes alone, and what they gathered is added up in one order.
#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/halves.h"
#include "common/simd.h"
#include "common/stable.h"

namespace errseg {
namespace {

constexpr int kWindow = 7;            // the k that the compiler knows
constexpr int kOutputs = 8;           // in registers at a time
constexpr int64_t kMostColumns = 48;  // of outputs: their ring still fits the first cache
constexpr int64_t kEnoughTasks = 64;  // maps are cut into strips of rows until there are that many

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ---- one row; a panel is a row of pixels with kLanes channels each

/// Pixels [first, first + count) of a row times `scale`, zero where there are none; no row means zeros.
template <typename T>
using LoadRow = void (*)(const T* row, int64_t first, int64_t count, int64_t width, int64_t channels,
                         int64_t lanes, Sum<T> scale, Sum<T>* panel);

template <typename T, int kLanes>
struct Load {
    using S = Sum<T>;
    ERRSEG_INLINE static void run(const T* row, int64_t first, int64_t count, int64_t width, int64_t channels,
                                  int64_t lanes, S scale, S* __restrict panel) {
        const int64_t begin = std::clamp<int64_t>(-first, 0, count);
        const int64_t end = row ? std::clamp<int64_t>(width - first, begin, count) : begin;
        std::fill(panel, panel + begin * kLanes, S(0));
        std::fill(panel + end * kLanes, panel + count * kLanes, S(0));
        for (int64_t i = begin; i < end; ++i) {
            const T* __restrict from = row + (first + i) * channels;
            S* __restrict to = panel + i * kLanes;
            __builtin_prefetch(from + width * channels);  // the row below
            if (lanes == kLanes)
#pragma omp simd
                for (int l = 0; l < kLanes; ++l) to[l] = scale * widen(from[l]);
            else
                for (int64_t l = 0; l < kLanes; ++l) to[l] = l < lanes ? scale * widen(from[l]) : S(0);
        }
    }
};

/// A panel, plus a row that may be added, to a row of a map so many channels wide.
template <typename T>
using StoreRow = void (*)(const Sum<T>* panel, int64_t count, int64_t width, int64_t channels, int64_t lanes,
                          const T* added, T* row);

template <typename T, int kLanes>
struct Store {
    using S = Sum<T>;
    ERRSEG_INLINE static void run(const S* __restrict panel, int64_t count, int64_t width, int64_t channels,
                                  int64_t lanes, const T* __restrict added, T* __restrict row) {
        for (int64_t i = 0; i < count; ++i, panel += kLanes, row += channels) {
            __builtin_prefetch(row + width * channels, 1);
            if (lanes != kLanes)
                for (int64_t l = 0; l < lanes; ++l)
                    row[l] = narrow<T>(added ? widen(added[l]) + panel[l] : panel[l]);
            else if (added)
#pragma omp simd
                for (int l = 0; l < kLanes; ++l) row[l] = narrow<T>(widen(added[l]) + panel[l]);
            else
#pragma omp simd
                for (int l = 0; l < kLanes; ++l) row[l] = narrow<T>(panel[l]);
            if (!added) continue;
            __builtin_prefetch(added + width * channels);
            added += channels;
        }
    }
};

/// Keeps gcc from spending a register on every neighbour of a vector.
template <typename V>
ERRSEG_INLINE V* one_address(V* pointer) {
    asm("" : "+r"(pointer));
    return pointer;
}

/// out = the sum over a window + a constant pixel; `rows` are k panels of `columns` + k - 1 pixels, `weights` [k, k]
/// pixels, `columns` a multiple of kOutputs.
template <typename S>
using ConvolveRow = void (*)(const S* const* rows, const S* weights, int64_t size, int64_t columns,
                             const S* constant, S* out);

/// kSize is k, or 0 for any.
template <typename S, int kBytes, int kSize>
struct Convolve {
    ERRSEG_INLINE static void run(const S* const* rows, const S* weights, int64_t size, int64_t columns,
                                  const S* constant, S* out) {
        using V = typename Vector<S, kBytes>::Type;
        if (kSize) size = kSize;
        for (int64_t x = 0; x < columns; x += kOutputs) {
            const int64_t offset = x * Vector<S, kBytes>::kLanes;
            V sums[kOutputs] = {};
            for (int64_t dy = 0; dy < size; ++dy) {
                const V* in = one_address(reinterpret_cast<const V*>(rows[dy] + offset));
                const V* window = reinterpret_cast<const V*>(weights) + dy * size;
                if constexpr (kSize > 0) {
                    V w[kSize];
#pragma GCC unroll 8
                    for (int i = 0; i < kSize; ++i) w[i] = window[i];
#pragma GCC unroll 16
                    for (int i = 0; i < kOutputs + kSize - 1; ++i) {
                        const V value = in[i];
#pragma GCC unroll 8
                        for (int j = 0; j < kOutputs; ++j)
                            if (0 <= i - j && i - j < kSize) sums[j] += w[i - j] * value;
                    }
                } else {
                    for (int64_t dx = 0; dx < size; ++dx)
#pragma GCC unroll 8
                        for (int j = 0; j < kOutputs; ++j) sums[j] += window[dx] * in[dx + j];
                }
            }
#pragma GCC unroll 8
            for (int j = 0; j < kOutputs; ++j)
                reinterpret_cast<V*>(out + offset)[j] = sums[j] + *reinterpret_cast<const V*>(constant);
        }
    }
};

/// gathered [k k + 1] pixels += the products of a row of centres with the panels around it, and the middle
/// panel itself, each summed over the row first.
template <typename S>
using GatherRow = void (*)(const S* const* rows, const S* centres, int64_t size, int64_t columns,
                           S* gathered);

template <typename S, int kBytes, int kSize>
struct Gather {
    using V = typename Vector<S, kBytes>::Type;

    ERRSEG_INLINE static void run(const S* const* rows, const S* centres, int64_t size, int64_t columns,
                                  S* gathered) {
        if (kSize) size = kSize;
        const V* middle = reinterpret_cast<const V*>(rows[size / 2]) + size / 2;
        V total = {};
        for (int64_t x = 0; x < columns; ++x) total += middle[x];
        reinterpret_cast<V*>(gathered)[size * size] += total;
        for (int64_t dy = 0; dy < size; ++dy) {
            const V* row = reinterpret_cast<const V*>(rows[dy]);
            V* window = reinterpret_cast<V*>(gathered) + dy * size;
            if constexpr (kSize > 0)
                gather<kSize>(row, reinterpret_cast<const V*>(centres), columns, window);
            else
                for (int64_t dx = 0; dx < size; ++dx)
                    gather<1>(row + dx, reinterpret_cast<const V*>(centres), columns, window + dx);
        }
    }

    template <int kTaps>
    ERRSEG_INLINE static void gather(const V* row, const V* centres, int64_t columns, V* window) {
        V sums[kTaps] = {};
        for (int64_t x = 0; x < columns; x += kOutputs) {
            const V *in = one_address(row + x), *c = one_address(centres + x);
#pragma GCC unroll 16
            for (int i = 0; i < kOutputs + kTaps - 1; ++i) {
                const V value = in[i];
#pragma GCC unroll 8
                for (int j = 0; j < kOutputs; ++j)
                    if (0 <= i - j && i - j < kTaps) sums[i - j] += c[j] * value;
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kTaps; ++i) window[i] += sums[i];
    }
};

template <typename T>
struct Kernels {
    LoadRow<T> load;
    StoreRow<T> store;
    ConvolveRow<Sum<T>> convolve;
    GatherRow<Sum<T>> gather;
    int64_t lanes;
};

template <typename T, int kSize>
Kernels<T> choose_kernels() {
    using S = Sum<T>;
    constexpr int size = sizeof(S);
#if defined(__x86_64__) && defined(__GNUC__)
    if (vector_bytes() == 64)
        return {avx512<Load<T, 64 / size>>, avx512<Store<T, 64 / size>>, avx512<Convolve<S, 64, kSize>>,
                avx512<Gather<S, 64, kSize>>, 64 / size};
    if (vector_bytes() == 32)
        return {avx2<Load<T, 32 / size>>, avx2<Store<T, 32 / size>>, avx2<Convolve<S, 32, kSize>>,
                avx2<Gather<S, 32, kSize>>, 32 / size};
#endif
    return {baseline<Load<T, 16 / size>>, baseline<Store<T, 16 / size>>, baseline<Convolve<S, 16, kSize>>,
            baseline<Gather<S, 16, kSize>>, 16 / size};
}

// ---- all rows

/// Maps, and the side of the window.
struct Shape {
    int64_t maps, height, width, channels, size;

    Shape(const Tensor& x, const Tensor& weight) {
        expect(x.dim() == 5, "x [B, K, H, W, C]", x);
        maps = x.size(0) * x.size(1), height = x.size(2), width = x.size(3), channels = x.size(4);
        expect(weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == 1 &&
                   weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
               "weight [C, 1, k, k] with k odd", weight);
        size = weight.size(2);
    }
    bool empty() const { return maps * height * width * channels == 0; }
    int64_t window() const { return size * size; }
};

/// One pass over all maps, forward or backward, in blocks of as many channels as a vector holds.
template <typename T>
class Walk {
  public:
    using S = Sum<T>;

    Walk(const Shape& shape, const T* in)
        : in(in),
          shape_(shape),
          kernels_(shape.size == kWindow ? choose_kernels<T, kWindow>() : choose_kernels<T, 0>()),
          blocks_(divide_up(shape.channels, kernels_.lanes)) {
        const int64_t strips =
            std::clamp<int64_t>(divide_up(kEnoughTasks, shape.maps * blocks_), 1, shape.height);
        rows_ = divide_up(shape.height, strips);
        strips_ = divide_up(shape.height, rows_);
        const int64_t columns = divide_up(shape.width, divide_up(shape.width, kMostColumns));
        columns_ = divide_up(columns, kOutputs) * kOutputs;
    }

    /// [channels, count] as [blocks, count] pixels; turned round, the last value comes first.
    Lines<S> pack(const Tensor& values_in, int64_t count, bool turned = false) const {
        const Tensor values = as_contiguous(values_in);
        expect(values.numel() == shape_.channels * count, "a value per channel", values);
        const Reader<S> read = reader<S>(values, "weight and bias");
        const int64_t lanes = kernels_.lanes;
        Lines<S> packed(blocks_ * count * lanes);
        std::vector<S> row(count);
        for (int64_t c = 0; c < shape_.channels; ++c) {
            read(values, c * count, count, row.data());
            if (turned) std::reverse(row.begin(), row.end());
            S* to = packed.data() + c / lanes * count * lanes + c % lanes;
            for (int64_t i = 0; i < count; ++i) to[i * lanes] = row[i];
        }
        return packed;
    }

    /// Of what `gathered` holds.
    int64_t gathered_size() const { return blocks_ * units() * unit_size(); }

    void run() const {
        torch::stable::parallel_for(0, units() * blocks_, 1, [&](int64_t begin, int64_t end) {
            Workspace work(*this);
            for (int64_t task = begin; task < end; ++task) run(task / blocks_, task % blocks_, work);
        });
    }

    /// Pixels [last - count, last) of `gathered` over all units as a gradient [channels, count], turned back.
    void reduce(int64_t last, int64_t count, const Tensor& gradient) const {
        visit_floating(gradient, "weight and bias", [&](auto tag) {
            using G = typename decltype(tag)::type;
            torch::stable::parallel_for(0, blocks_, 1, [&](int64_t begin, int64_t end) {
                for (int64_t block = begin; block < end; ++block)
                    reduce(block, last, count, mutable_data<G>(gradient));
            });
        });
    }

    const T* in;                 // [maps, height, width, channels]: x, or the incoming gradient
    const S* scales = nullptr;   // [maps], of `in`
    const S* weights = nullptr;  // packed
    const S* bias = nullptr;     // packed
    const T* added = nullptr;    // to `out`, like `in`
    T* out = nullptr;            // like `in`
    const T* centres = nullptr;  // like `in`: x in the backward pass
    S* gathered = nullptr;       // [blocks, maps, strips, k k + 1] pixels: the window turned round, the bias

  private:
    /// Panels that a thread works with.
    struct Workspace {
        explicit Workspace(const Walk& walk)
            : pitch((walk.columns_ + walk.shape_.size - 1) * walk.kernels_.lanes),
              ring(walk.shape_.size * pitch),
              out(walk.columns_ * walk.kernels_.lanes),
              centres(walk.columns_ * walk.kernels_.lanes),
              constant(walk.kernels_.lanes) {
            for (int64_t i = 0; i < walk.shape_.size; ++i) rows.push_back(ring.data() + i * pitch);
        }
        int64_t pitch;
        Lines<S> ring, out, centres, constant;
        std::vector<S*> rows;
    };

    /// Columns of a strip of rows of a map, in some channels.
    struct Piece {
        int64_t map, top, bottom, left, channel;
        S scale;
        S* gathered;
    };

    int64_t units() const { return shape_.maps * strips_; }
    int64_t unit_size() const { return (shape_.window() + 1) * kernels_.lanes; }

    void run(int64_t unit, int64_t block, Workspace& work) const {
        const int64_t lanes = kernels_.lanes, map = unit / strips_, top = unit % strips_ * rows_;
        const S scale = scales ? scales[map] : S(1);
        for (int64_t l = 0; bias && l < lanes; ++l) work.constant.data()[l] = scale * bias[block * lanes + l];
        S* sums = gathered ? gathered + (block * units() + unit) * unit_size() : nullptr;
        const int64_t bottom = std::min(top + rows_, shape_.height);
        for (int64_t left = 0; left < shape_.width; left += columns_)
            run({map, top, bottom, left, block * lanes, scale, sums}, work);
    }

    void run(const Piece& piece, Workspace& work) const {
        const int64_t size = shape_.size, halo = size / 2;
        for (int64_t i = 1; i < size; ++i) load(piece, piece.top + i - 1 - halo, work.rows[i]);
        for (int64_t y = piece.top; y < piece.bottom; ++y) {
            std::rotate(work.rows.begin(), work.rows.begin() + 1, work.rows.end());
            load(piece, y + halo, work.rows[size - 1]);
            if (out) {
                kernels_.convolve(work.rows.data(), weights + piece.channel * shape_.window(), size, columns_,
                                  work.constant.data(), work.out.data());
                store(piece, y, work.out.data());
            }
            if (piece.gathered) {
                kernels_.load(centres + start_of_row(piece, y), piece.left, columns_, shape_.width,
                              shape_.channels, lanes(piece), S(1), work.centres.data());
                kernels_.gather(work.rows.data(), work.centres.data(), size, columns_, piece.gathered);
            }
        }
    }

    void load(const Piece& piece, int64_t y, S* panel) const {
        const T* row = 0 <= y && y < shape_.height ? in + start_of_row(piece, y) : nullptr;
        kernels_.load(row, piece.left - shape_.size / 2, columns_ + shape_.size - 1, shape_.width,
                      shape_.channels, lanes(piece), piece.scale, panel);
    }

    void store(const Piece& piece, int64_t y, const S* panel) const {
        const int64_t start = start_of_row(piece, y) + piece.left * shape_.channels;
        kernels_.store(panel, std::min(columns_, shape_.width - piece.left), shape_.width, shape_.channels,
                       lanes(piece), added ? added + start : nullptr, out + start);
    }

    int64_t lanes(const Piece& piece) const {
        return std::min(kernels_.lanes, shape_.channels - piece.channel);
    }
    int64_t start_of_row(const Piece& piece, int64_t y) const {
        return (piece.map * shape_.height + y) * shape_.width * shape_.channels + piece.channel;
    }

    template <typename G>
    void reduce(int64_t block, int64_t last, int64_t count, G* gradient) const {
        std::vector<double> totals(unit_size());
        for (int64_t unit = 0; unit < units(); ++unit) {
            const S* sums = gathered + (block * units() + unit) * unit_size();
            for (int64_t i = 0; i < unit_size(); ++i) totals[i] += static_cast<double>(sums[i]);
        }
        const int64_t lanes = kernels_.lanes, first = block * lanes;
        for (int64_t c = first; c < std::min(first + lanes, shape_.channels); ++c)
            for (int64_t i = 0; i < count; ++i)
                gradient[c * count + i] = static_cast<G>(totals[(last - 1 - i) * lanes + c - first]);
    }

    const Shape shape_;
    const Kernels<T> kernels_;
    const int64_t blocks_;
    int64_t rows_, strips_, columns_;  // rows of a strip, strips of a map, columns of a piece
};

void expect_like(const Tensor& tensor, const char* expected, const Tensor& x) {
    bool same = tensor.dim() == x.dim() && tensor.scalar_type() == x.scalar_type();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = tensor.size(d) == x.size(d);
    expect(same, expected, tensor);
}

/// The scale of every map; empty when none is scaled.
template <typename S>
std::vector<S> read_scales(const std::optional<Tensor>& drop_path, int64_t maps) {
    if (!drop_path) return {};
    const Tensor values = as_contiguous(*drop_path);
    expect(values.numel() == maps, "drop_path [B, K]", values);
    std::vector<S> scales(maps);
    reader<S>(values, "drop_path")(values, 0, maps, scales.data());
    return scales;
}

Tensor depthwise_conv_cpu(const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& residual, const std::optional<Tensor>& drop_path) {
    const Shape shape(x_in, weight);
    if (residual) expect_like(*residual, "residual like x", x_in);
    const Tensor x = as_contiguous(x_in), added = residual ? as_contiguous(*residual) : x;
    Tensor out = torch::stable::empty_like(x);
    if (shape.empty()) return out;
    visit_floating(x, "x", [&](auto tag) {
        using T = typename decltype(tag)::type;
        Walk<T> walk(shape, data<T>(x));
        const auto scales = read_scales<Sum<T>>(drop_path, shape.maps);
        auto weights = walk.pack(weight, shape.window());
        Lines<Sum<T>> biases(0);
        if (bias) biases = walk.pack(*bias, 1);
        walk.scales = scales.empty() ? nullptr : scales.data();
        walk.weights = weights.data(), walk.bias = biases.data();
        walk.added = residual ? data<T>(added) : nullptr;
        walk.out = mutable_data<T>(out);
        walk.run();
    });
    return out;
}

/// Gradients of x, weight and bias where needed; the residual's is the incoming one.
std::vector<Tensor> depthwise_conv_cpu_bwd(const Tensor& grad_in, const Tensor& x_in, const Tensor& weight,
                                           const std::optional<Tensor>& bias, const std::optional<Tensor>&,
                                           const std::optional<Tensor>& drop_path,
                                           const std::vector<bool>& needed) {
    const Shape shape(x_in, weight);
    expect_like(grad_in, "grad like x", x_in);
    const Tensor grad = as_contiguous(grad_in), x = as_contiguous(x_in);
    std::vector<Tensor> gradients;
    for (size_t i = 0; i < needed.size(); ++i) gradients.push_back(empty(x, {0}, x.scalar_type()));
    if (needed[0]) gradients[0] = torch::stable::empty_like(x);
    if (needed[1])
        gradients[1] = torch::stable::new_zeros(weight, {shape.channels, 1, shape.size, shape.size});
    if (needed[2]) gradients[2] = torch::stable::new_zeros(*bias, {shape.channels});
    if (shape.empty()) return gradients;
    visit_floating(x, "x", [&](auto tag) {
        using T = typename decltype(tag)::type;
        Walk<T> walk(shape, data<T>(grad));
        const auto scales = read_scales<Sum<T>>(drop_path, shape.maps);
        auto weights = walk.pack(weight, shape.window(), true);
        Lines<Sum<T>> gathered(needed[1] || needed[2] ? walk.gathered_size() : 0);
        walk.scales = scales.empty() ? nullptr : scales.data();
        walk.weights = weights.data();
        walk.out = needed[0] ? mutable_data<T>(gradients[0]) : nullptr;
        walk.centres = data<T>(x);
        walk.gathered = gathered.data();
        walk.run();
        if (needed[1]) walk.reduce(shape.window(), shape.window(), gradients[1]);
        if (needed[2]) walk.reduce(shape.window() + 1, 1, gradients[2]);
    });
    return gradients;
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CPU, m) {
    m.impl("depthwise_conv_cpu", TORCH_BOX(&errseg::depthwise_conv_cpu));
    m.impl("depthwise_conv_cpu_bwd", TORCH_BOX(&errseg::depthwise_conv_cpu_bwd));
}
