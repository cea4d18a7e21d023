#include <optional>
#include <vector>

#include "common/stable_cuda.cuh"
#include "depthwise_conv/depthwise_conv.cuh"

namespace errseg {
namespace {

using depthwise_conv::Maps;
using depthwise_conv::Numbers;

Numbers numbers(const Tensor& tensor, const char* name) {
    Numbers result;
    visit_device_floating(tensor, name, [&](auto tag) {
        result = {const_cast<void*>(tensor.const_data_ptr()), number_of<typename decltype(tag)::type>};
    });
    return result;
}

// An argument that may be missing, contiguous, with so many numbers.
std::optional<Tensor> optional_like(const std::optional<Tensor>& tensor, const Tensor& x, const char* name,
                                    int64_t count) {
    if (!tensor) return {};
    expect_same_device(x, *tensor, name);
    expect(tensor->numel() == count, name, *tensor);
    return as_contiguous(*tensor);
}

Maps maps_of(const Tensor& x, const Tensor& weight) {
    expect(x.dim() == 5, "x [B, K, H, W, C]", x);
    expect(weight.dim() == 4 && weight.size(0) == x.size(4) && weight.size(1) == 1 &&
               weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
           "weight [C, 1, k, k] with k odd", weight);
    expect_same_device(x, weight, "weight");
    STD_TORCH_CHECK(weight.size(2) < 256, "expected a window below 256, got ", weight.size(2));
    as_int(x.size(3) * x.size(4), "W x C");
    return {as_int(x.size(0) * x.size(1), "B x K"), as_int(x.size(2), "H"), as_int(x.size(3), "W"),
            as_int(x.size(4), "C")};
}

void expect_like(const Tensor& tensor, const char* expected, const Tensor& x) {
    bool same = tensor.dim() == x.dim() && tensor.scalar_type() == x.scalar_type();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = tensor.size(d) == x.size(d);
    expect(same, expected, tensor);
    expect_same_device(x, tensor, expected);
}

template <typename T>
void convolve(const depthwise_conv::Convolution<T>& problem, const Tensor& x) {
    if (problem.maps.numel() == 0) return;
    const auto cut = depthwise_conv::Cut::walk(problem.maps, false);
    expect(cut.blocks() <= INT_MAX, "a smaller x: the grid of blocks is too large", x);
    check(depthwise_conv::run(problem, current_stream(x)), "depthwise_conv");
}

Tensor depthwise_conv_cuda(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
                           const std::optional<Tensor>& residual_in,
                           const std::optional<Tensor>& drop_path_in) {
    const Maps maps = maps_of(x_in, weight_in);
    const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
    const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
    const auto bias = optional_like(bias_in, x, "bias [C]", maps.channels);
    const auto drop_path = optional_like(drop_path_in, x, "drop_path [B, K]", maps.count);
    if (residual_in) expect_like(*residual_in, "residual like x", x);
    const auto residual = optional_like(residual_in, x, "residual", x.numel());
    Tensor out = torch::stable::empty_like(x);
    visit_device_floating(x, "x", [&](auto tag) {
        using T = typename decltype(tag)::type;
        depthwise_conv::Convolution<T> problem{maps, as_int(weight.size(2), "k"), data<T>(x)};
        problem.weight = numbers(weight, "weight");
        if (bias) problem.bias = numbers(*bias, "bias");
        if (drop_path) problem.scales = numbers(*drop_path, "drop_path");
        if (residual) problem.added = data<T>(*residual);
        problem.out = mutable_data<T>(out);
        convolve(problem, x);
    });
    return out;
}

// Gradients of x, weight and bias where needed; the residual's is the incoming one.
std::vector<Tensor> depthwise_conv_cuda_bwd(const Tensor& grad_in, const Tensor& x_in,
                                            const Tensor& weight_in, const std::optional<Tensor>& bias,
                                            const std::optional<Tensor>&,
                                            const std::optional<Tensor>& drop_path_in,
                                            const std::vector<bool>& needed) {
    const Maps maps = maps_of(x_in, weight_in);
    expect_like(grad_in, "grad like x", x_in);
    const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
    const Tensor x = as_contiguous(x_in), grad = as_contiguous(grad_in), weight = as_contiguous(weight_in);
    const auto drop_path = optional_like(drop_path_in, x, "drop_path [B, K]", maps.count);
    const int64_t size = weight.size(2);
    std::vector<Tensor> gradients;
    for (size_t i = 0; i < needed.size(); ++i) gradients.push_back(empty(x, {0}, x.scalar_type()));
    if (needed[0]) gradients[0] = torch::stable::empty_like(x);
    if (needed[1]) gradients[1] = torch::stable::new_zeros(weight, {maps.channels, 1, size, size});
    if (needed[2]) gradients[2] = torch::stable::new_zeros(*bias, {maps.channels});
    visit_device_floating(x, "x", [&](auto tag) {
        using T = typename decltype(tag)::type;
        const Numbers scales = drop_path ? numbers(*drop_path, "drop_path") : Numbers{};
        if (needed[0]) {
            depthwise_conv::Convolution<T> problem{maps, as_int(size, "k"), data<T>(grad)};
            problem.weight = numbers(weight, "weight"), problem.turned = true;
            problem.scales = scales;
            problem.out = mutable_data<T>(gradients[0]);
            convolve(problem, x);
        }
        if (maps.numel() == 0 || !(needed[1] || needed[2])) return;
        depthwise_conv::Gathering<T> problem{maps, as_int(size, "k"), data<T>(x), data<T>(grad), scales};
        if (needed[1]) problem.weight_grad = numbers(gradients[1], "weight");
        if (needed[2]) problem.bias_grad = numbers(gradients[2], "bias");
        const auto cut = problem.cut();
        expect(cut.blocks() <= INT_MAX, "a smaller x: the grid of blocks is too large", x);
        const Tensor gathered = empty(x, {cut.units(), size * size + 1, maps.channels}, score_dtype(x));
        problem.gathered = mutable_data<accumulator_t<T>>(gathered);
        check(depthwise_conv::run(problem, current_stream(x)), "depthwise_conv");
    });
    return gradients;
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CUDA, m) {
    m.impl("depthwise_conv_cuda", TORCH_BOX(&errseg::depthwise_conv_cuda));
    m.impl("depthwise_conv_cuda_bwd", TORCH_BOX(&errseg::depthwise_conv_cuda_bwd));
}
