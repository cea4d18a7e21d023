// The gated MLP of tokens, a tile at a time: hidden units never leave the second cache.
#include "gated_mlp/gated_mlp.h"

namespace errseg {
namespace {

constexpr int64_t kRows = 128;  // of a tile

/// What a thread works with.
template <typename S, typename E, typename Mlp>
struct Workspace {
    Workspace(const Mlp& mlp, int64_t channels)
        : z(kRows, channels), out(kRows, channels), grad(kRows, channels), scales(kRows), mlp(mlp, kRows) {}
    OwnTile<E> z;
    OwnTile<S> out, grad;
    Buffer<S> scales;
    typename Mlp::Workspace mlp;
};

template <typename T, typename E>
void forward(const T* x, const GatedMlpTensors& tensors, int64_t tokens, double eps,
             const Kernels<T, E>& kernels, T* out) {
    using S = Computed<T>;
    const GatedMlp<T, E> mlp(tensors, kernels);
    const int64_t channels = tensors.channels.channels();
    torch::stable::parallel_for(0, divide_up(tokens, kRows), 1, [&](int64_t begin, int64_t end) {
        Workspace<S, E, GatedMlp<T, E>> work(mlp, channels);
        for (int64_t first = begin * kRows; first < std::min(tokens, end * kRows); first += kRows) {
            const int64_t rows = std::min(kRows, tokens - first);
            for (int64_t row = 0; row < rows; ++row)
                kernels.normalize(x + (first + row) * channels, channels, static_cast<S>(eps),
                                  work.z.tile().from_row(row), nullptr);
            mlp.run(work.z, work.out, rows, work.mlp);
            for (int64_t row = 0; row < rows; ++row)
                kernels.store(work.out.tile().from_row(row), channels, S(1), nullptr,
                              out + (first + row) * channels);
        }
    });
}

template <typename T>
void backward(const T* grad, const T* x, const GatedMlpTensors& tensors, int64_t tokens, double eps, T* d_x,
              const Tensor* gradients) {
    using S = Computed<T>;
    const Kernels<T, S> kernels = errseg::kernels<T>();
    const BackwardKernels<T> backward = backward_kernels<T>();
    Places places;
    const GatedMlpBackward<T> mlp(tensors, kernels, places);
    const int64_t channels = tensors.channels.channels(), tiles = divide_up(tokens, kRows);
    const int64_t groups = std::min(tiles, kGroups);
    Totals<S> totals(groups, places.size());
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
        Workspace<S, S, GatedMlpBackward<T>> work(mlp, channels);
        const Tile<S> z = work.z, g = work.grad, dz = work.out;
        for (int64_t group = begin; group < end; ++group) {
            S* sums = totals.start(group);
            const auto [from, to] = part(tiles, group, groups);
            for (int64_t first = from * kRows; first < std::min(tokens, to * kRows); first += kRows) {
                const int64_t rows = std::min(kRows, tokens - first);
                for (int64_t row = 0; row < rows; ++row) {
                    const int64_t at = (first + row) * channels;
                    kernels.normalize(x + at, channels, static_cast<S>(eps), z.from_row(row),
                                      work.scales.data() + row);
                    kernels.load(grad + at, channels, S(1), g.from_row(row));
                }
                mlp.run(z, g, dz, rows, sums, work.mlp);
                for (int64_t row = 0; row < rows; ++row)
                    backward.normalize(dz.from_row(row), z.from_row(row), channels, work.scales.data()[row],
                                       static_cast<const T*>(nullptr), d_x + (first + row) * channels);
            }
        }
    });
    totals.add_up();
    mlp.write(totals, gradients);
}

Tensor gated_mlp_cpu(const Tensor& x_in, const Tensor& gate_weight, const Tensor& gate_bias,
                     const Tensor& value_weight, const Tensor& value_bias, const Tensor& out_weight,
                     const Tensor& out_bias, double eps) {
    const GatedMlpTensors tensors(gate_weight, gate_bias, value_weight, value_bias, out_weight, out_bias);
    const Tensor x = as_contiguous(x_in);
    const int64_t channels = tensors.channels.channels();
    expect(x.dim() >= 1 && x.size(x.dim() - 1) == channels, "x [..., C]", x);
    Tensor out = torch::stable::empty_like(x);
    if (x.numel() == 0) return out;
    visit_floating(x, "x", [&](auto tag) {
        using T = typename decltype(tag)::type;
        with_kernels<T>([&](const auto& table) {
            forward(data<T>(x), tensors, x.numel() / channels, eps, table, mutable_data<T>(out));
        });
    });
    return out;
}

std::vector<Tensor> gated_mlp_cpu_bwd(const Tensor& grad_in, const Tensor& x_in, const Tensor& gate_weight,
                                      const Tensor& gate_bias, const Tensor& value_weight,
                                      const Tensor& value_bias, const Tensor& out_weight,
                                      const Tensor& out_bias, double eps, const std::vector<bool>&) {
    const GatedMlpTensors tensors(gate_weight, gate_bias, value_weight, value_bias, out_weight, out_bias);
    const Tensor x = as_contiguous(x_in), grad = as_contiguous(grad_in);
    expect(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type(), "grad like x", grad);
    std::vector<Tensor> gradients{torch::stable::empty_like(x)};
    for (const Tensor* weight : {&tensors.gate_weight, &tensors.gate_bias, &tensors.value_weight,
                                 &tensors.value_bias, &tensors.out_weight, &tensors.out_bias})
        gradients.push_back(torch::stable::new_zeros(*weight, weight->sizes()));
    if (x.numel() == 0) return gradients;
    visit_floating(x, "x", [&](auto tag) {
        using T = typename decltype(tag)::type;
        backward<T>(data<T>(grad), data<T>(x), tensors, x.numel() / tensors.channels.channels(), eps,
                    mutable_data<T>(gradients[0]), &gradients[1]);
    });
    return gradients;
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CPU, m) {
    m.impl("gated_mlp_cpu", TORCH_BOX(&errseg::gated_mlp_cpu));
    m.impl("gated_mlp_cpu_bwd", TORCH_BOX(&errseg::gated_mlp_cpu_bwd));
}
