// Bilinear upsampling with aligned corners plus a residual, on token-major maps: all channels of a pixel stand
// together, so every tap is a row of them and every loop below runs over channels.
#include <algorithm>
#include <vector>

#include "common/halves.h"
#include "common/simd.h"
#include "common/stable.h"

namespace errseg {
namespace {

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// For each output position of an axis, its two input positions and the weight of the second.
template <typename S>
struct Axis {
    Axis(int64_t input, int64_t output) : low(output), high(output), weight(output) {
        const int64_t span = std::max<int64_t>(output - 1, 1);
        for (int64_t o = 0; o < output; ++o) {
            const int64_t numerator = o * (input - 1);
            low[o] = numerator / span;
            high[o] = std::min(low[o] + 1, input - 1);
            weight[o] = static_cast<S>(static_cast<double>(numerator % span) / static_cast<double>(span));
        }
    }
    std::vector<int64_t> low, high;
    std::vector<S> weight;
};

/// out = (1 - weight) first + weight second, of n numbers.
template <typename T, typename S>
ERRSEG_CLONES void mix_rows(const T* __restrict first, const T* __restrict second, S weight, int64_t n,
                            S* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = (1 - weight) * widen(first[i]) + weight * widen(second[i]);
}

/// A row of outputs from a row of inputs that was mixed already, plus the residual.
template <typename T, typename S>
ERRSEG_CLONES void expand_row(const S* row, const Axis<S>& columns, int64_t width, int64_t channels,
                              const T* __restrict added, T* __restrict out) {
    for (int64_t x = 0; x < width; ++x, added += channels, out += channels) {
        const S* __restrict left = row + columns.low[x] * channels;
        const S* __restrict right = row + columns.high[x] * channels;
        const S weight = columns.weight[x];
        for (int64_t c = 0; c < channels; ++c)
            out[c] = narrow<T>(widen(added[c]) + ((1 - weight) * left[c] + weight * right[c]));
    }
}

/// The transpose of expand_row: every output's gradient to its two inputs.
template <typename T, typename S>
ERRSEG_CLONES void fold_row(const T* __restrict grad, const Axis<S>& columns, int64_t width, int64_t channels,
                            S* row) {
    for (int64_t x = 0; x < width; ++x, grad += channels) {
        S* left = row + columns.low[x] * channels;
        S* right = row + columns.high[x] * channels;
        const S weight = columns.weight[x];
        // One after the other: at the edge they are the same pixel.
        for (int64_t c = 0; c < channels; ++c) left[c] += (1 - weight) * widen(grad[c]);
        for (int64_t c = 0; c < channels; ++c) right[c] += weight * widen(grad[c]);
    }
}

template <typename S>
ERRSEG_CLONES void add_scaled(const S* __restrict row, S weight, int64_t n, S* __restrict total) {
    for (int64_t i = 0; i < n; ++i) total[i] += weight * row[i];
}

template <typename T, typename S>
ERRSEG_CLONES void store_row(const S* __restrict row, int64_t n, T* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(row[i]);
}

/// Sizes of a small and a large stack of maps with the same channels.
struct Shape {
    Shape(const Tensor& x, const Tensor& large)
        : maps(x.size(0) * x.size(1)),
          in_height(x.size(2)),
          in_width(x.size(3)),
          height(large.size(2)),
          width(large.size(3)),
          channels(x.size(4)) {
        expect(large.dim() == 5 && large.size(0) == x.size(0) && large.size(1) == x.size(1) &&
                   large.size(4) == channels && large.scalar_type() == x.scalar_type(),
               "a large map like x", large);
    }
    bool empty() const { return maps * height * width * channels == 0; }
    int64_t in_row() const { return in_width * channels; }
    int64_t row() const { return width * channels; }

    int64_t maps, in_height, in_width, height, width, channels;
};

constexpr int64_t kStrip = 8;  // rows of outputs that a task makes

Tensor upsample_residual_cpu(const Tensor& x_in, const Tensor& residual_in) {
    const Tensor x = as_contiguous(x_in), residual = as_contiguous(residual_in);
    const Shape s(x, residual);
    Tensor out = torch::stable::empty_like(residual);
    if (s.empty()) return out;
    visit_floating(x, "x", [&](auto tag) {
        using T = typename decltype(tag)::type;
        using S = Sum<T>;
        const Axis<S> rows(s.in_height, s.height), columns(s.in_width, s.width);
        const T *from = data<T>(x), *added = data<T>(residual);
        T* to = mutable_data<T>(out);
        const int64_t strips = (s.height + kStrip - 1) / kStrip;
        torch::stable::parallel_for(0, s.maps * strips, 1, [&](int64_t begin, int64_t end) {
            std::vector<S> mixed(s.in_row());
            for (int64_t task = begin; task < end; ++task) {
                const int64_t map = task / strips, top = task % strips * kStrip;
                const T* image = from + map * s.in_height * s.in_row();
                for (int64_t y = top; y < std::min(top + kStrip, s.height); ++y) {
                    mix_rows(image + rows.low[y] * s.in_row(), image + rows.high[y] * s.in_row(),
                             rows.weight[y], s.in_row(), mixed.data());
                    const int64_t start = (map * s.height + y) * s.row();
                    expand_row(mixed.data(), columns, s.width, s.channels, added + start, to + start);
                }
            }
        });
    });
    return out;
}

/// The gradient of x; the residual's is the incoming one. A task owns a map, and its sums have a fixed order.
std::vector<Tensor> upsample_residual_cpu_bwd(const Tensor& grad_in, const Tensor& x, const Tensor&,
                                              const std::vector<bool>& needed) {
    std::vector<Tensor> gradients(2, empty(grad_in, {0}, grad_in.scalar_type()));
    if (!needed[0]) return gradients;
    const Tensor grad = as_contiguous(grad_in);
    const Shape s(x, grad);
    gradients[0] =
        torch::stable::new_zeros(grad, {x.size(0), x.size(1), s.in_height, s.in_width, s.channels});
    if (s.empty()) return gradients;
    visit_floating(grad, "grad", [&](auto tag) {
        using T = typename decltype(tag)::type;
        using S = Sum<T>;
        const Axis<S> rows(s.in_height, s.height), columns(s.in_width, s.width);
        const T* from = data<T>(grad);
        T* to = mutable_data<T>(gradients[0]);
        torch::stable::parallel_for(0, s.maps, 1, [&](int64_t begin, int64_t end) {
            std::vector<S> folded(s.in_row()), total(s.in_height * s.in_row());
            for (int64_t map = begin; map < end; ++map) {
                std::fill(total.begin(), total.end(), S(0));
                for (int64_t y = 0; y < s.height; ++y) {
                    std::fill(folded.begin(), folded.end(), S(0));
                    fold_row(from + (map * s.height + y) * s.row(), columns, s.width, s.channels,
                             folded.data());
                    add_scaled(folded.data(), 1 - rows.weight[y], s.in_row(),
                               total.data() + rows.low[y] * s.in_row());
                    add_scaled(folded.data(), rows.weight[y], s.in_row(),
                               total.data() + rows.high[y] * s.in_row());
                }
                store_row(total.data(), static_cast<int64_t>(total.size()),
                          to + map * s.in_height * s.in_row());
            }
        });
    });
    return gradients;
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CPU, m) {
    m.impl("upsample_residual_cpu", TORCH_BOX(&errseg::upsample_residual_cpu));
    m.impl("upsample_residual_cpu_bwd", TORCH_BOX(&errseg::upsample_residual_cpu_bwd));
}
