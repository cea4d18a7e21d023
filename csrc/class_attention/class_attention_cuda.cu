#include "class_attention/class_attention.cuh"

#include <optional>
#include <tuple>
#include <vector>

#include "class_attention/stream.cuh"
#include "common/halves_cuda.cuh"

namespace errseg {
namespace {

using class_attention::Device;
using class_attention::Problem;

constexpr const char* kClassAttention = "class_attention";

Device device_of(const Tensor& tensor) {
    Device device{};
    const auto index = tensor.get_device_index();
    check(cudaDeviceGetAttribute(&device.block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
          kClassAttention);
    check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index),
          kClassAttention);
    return device;
}

using Tensors = std::vector<Tensor>;
using Mask = std::optional<Tensor>;

void check_sizes(const Problem& p, const Tensor& tensor) {
    const char* reason = class_attention::unsupported(p.channels, p.heads, p.hidden);
    STD_TORCH_CHECK(!reason, "expected ", reason ? reason : "", ", got ", p.heads, " heads and ", p.hidden,
                    " hidden units for ", describe(tensor));
    as_int(int64_t(p.batch) * p.num_classes * p.area(), "B x K x h x w");
    as_int(int64_t(p.batch) * p.area() + 1024, "B x h x w");
}

// The MLP's six: [M, C], [M], the same, [C, M], [C].
void add_mlp(Problem& p, const Tensor& like, const Tensor* mlp, const Mask& drop, double eps) {
    expect(mlp[0].dim() == 2, "mlp_gate_weight [M, C]", mlp[0]);
    p.type = type_of(like), p.hidden = as_int(mlp[0].size(0), "M"), p.eps = float(eps);
    check_sizes(p, like);
    const int64_t square = int64_t(p.hidden) * p.channels;
    p.gate_weight = take(mlp[0], like, square, "mlp_gate_weight [M, C]");
    p.gate_bias = take(mlp[1], like, p.hidden, "mlp_gate_bias [M]");
    p.unit_weight = take(mlp[2], like, square, "mlp_value_weight [M, C]");
    p.unit_bias = take(mlp[3], like, p.hidden, "mlp_value_bias [M]");
    p.mlp_out_weight = take(mlp[4], like, square, "mlp_out_weight [C, M]");
    p.mlp_out_bias = take(mlp[5], like, p.channels, "mlp_out_bias [C]");
    p.drop_mlp = take(drop, like, int64_t(p.batch) * p.area(), "drop_mlp [B, h, w]");
}

// Rows [N, C] that are sums of map and attention.
Problem problem(const Tensor& sums, const Tensors& mlp, const Mask& drop_mlp, double eps) {
    expect(sums.dim() == 2 && sums.numel() > 0 && mlp.size() == 6, "rows [N, C], six weights", sums);
    Problem p{};
    p.batch = p.num_classes = p.height = 1;
    p.width = as_int(sums.size(0), "N"), p.channels = as_int(sums.size(1), "C");
    p.heads = std::max(1, p.channels / 16);
    add_mlp(p, sums, mlp.data(), drop_mlp, eps);
    return p;
}

// Maps [B, K, .., .., C] whose pooled ones are height x width; weights in the order of the op's arguments.
Problem problem(const Tensor& maps, int64_t height, int64_t width, const Tensors& w,
                const Mask& drop_attention, const Mask& drop_mlp, int64_t heads, double eps) {
    expect(maps.dim() == 5 && maps.numel() > 0 && height > 0 && width > 0 && w.size() == 14,
           "maps [B, K, H, W, C], 14 weights", maps);
    Problem p{};
    p.attends = true;
    p.batch = as_int(maps.size(0), "B"), p.num_classes = as_int(maps.size(1), "K");
    p.height = as_int(height, "h"), p.width = as_int(width, "w"), p.channels = as_int(maps.size(4), "C");
    p.heads = as_int(heads, "heads");
    add_mlp(p, maps, w.data() + 8, drop_mlp, eps);
    const int64_t texts = int64_t(p.batch) * p.num_classes * p.channels,
                  square = int64_t(p.channels) * p.channels;
    p.query_text = take(w[0], maps, texts, "query_text [B, K, C]");
    p.key_text = take(w[1], maps, texts, "key_text [B, K, C]");
    p.query_weight = take(w[2], maps, square, "query_weight [C, C]");
    p.key_weight = take(w[3], maps, square, "key_weight [C, C]");
    p.value_weight = take(w[4], maps, square, "value_weight [C, C]");
    p.value_bias = take(w[5], maps, p.channels, "value_bias [C]");
    p.out_weight = take(w[6], maps, square, "out_weight [C, C]");
    p.out_bias = take(w[7], maps, p.channels, "out_bias [C]");
    p.drop_attention = take(drop_attention, maps, int64_t(p.batch) * p.area(), "drop_attention [B, h, w]");
    return p;
}

Problem pooled_problem(const Tensor& pooled, const Tensors& weights, const Mask& drop_attention,
                       const Mask& drop_mlp, int64_t heads, double eps, int64_t first, int64_t count) {
    expect(pooled.dim() == 5, "pooled [B, K, h, w, C]", pooled);
    const auto p =
        problem(pooled, pooled.size(2), pooled.size(3), weights, drop_attention, drop_mlp, heads, eps);
    expect(first >= 0 && count > 0 && first + count <= int64_t(p.batch) * p.area(), "a part of the pixels",
           pooled);
    as_int(count * p.num_classes, "rows of a part");
    return p;
}

int64_t most_classes(const Tensor& like, int64_t heads, int64_t hidden) {
    Problem p{};
    p.type = type_of(like), p.channels = as_int(like.size(like.dim() - 1), "C"),
    p.heads = as_int(heads, "heads");
    p.batch = p.height = p.width = 1, p.hidden = as_int(hidden, "M");
    check_sizes(p, like);
    return class_attention::most_classes(p, device_of(like));
}

std::tuple<Tensor, Tensor> class_attention_fwd(const Tensor& x, const Tensors& weights,
                                               const Mask& drop_attention, const Mask& drop_mlp,
                                               int64_t heads, double eps, bool training) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    expect(x.dim() == 5, "x [B, K, H, W, C]", x);
    const auto p = problem(x, x.size(2) / 2, x.size(3) / 2, weights, drop_attention, drop_mlp, heads, eps);
    Tensor out = empty(x, {p.batch, p.num_classes, p.height, p.width, p.channels}, x.scalar_type());
    Tensor pooled = training ? torch::stable::empty_like(out) : empty(x, {0}, x.scalar_type());
    class_attention::Forward f{};
    f.x = take(x, x, x.numel(), "x contiguous and aligned");
    f.in_height = as_int(x.size(2), "H"), f.in_width = as_int(x.size(3), "W");
    f.out = out.mutable_data_ptr(), f.pooled = training ? pooled.mutable_data_ptr() : nullptr;
    check(class_attention::forward(p, f, device_of(x), current_stream(x)), kClassAttention);
    return {out, pooled};
}

Tensor class_attention_mlp_fwd(const Tensor& sums, const Tensors& weights, const Mask& drop_mlp, double eps) {
    const torch::stable::accelerator::DeviceGuard guard(sums.get_device_index());
    const auto p = problem(sums, weights, drop_mlp, eps);
    Tensor out = torch::stable::empty_like(sums);
    class_attention::Forward f{};
    f.x = take(sums, sums, sums.numel(), "rows contiguous and aligned"), f.out = out.mutable_data_ptr();
    check(class_attention::forward(p, f, device_of(sums), current_stream(sums)), kClassAttention);
    return out;
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five backward_mlp(const Problem& p, const Tensor& grad, const Tensor& source, int64_t first, int64_t count) {
    const int64_t numbers = int64_t(p.batch) * p.num_classes * p.area() * p.channels,
                  rows = count * p.num_classes;
    const auto made = [&](int64_t columns) { return empty(grad, {rows, columns}, grad.scalar_type()); };
    Tensor z = made(p.channels), branch = made(p.channels), units = made(p.hidden),
           units_grad = made(2 * p.hidden);
    Tensor sum_grad = made(p.channels);
    class_attention::BackwardMLP b{};
    b.grad = take(grad, source, numbers, "grad like the result");
    b.source = take(source, source, numbers, "maps like the result");
    b.z = z.mutable_data_ptr(), b.branch = branch.mutable_data_ptr(), b.units = units.mutable_data_ptr();
    b.units_grad = units_grad.mutable_data_ptr(), b.sum_grad = sum_grad.mutable_data_ptr();
    check(class_attention::backward_mlp(p, b, int(first), int(count), device_of(grad), current_stream(grad)),
          kClassAttention);
    return {z, branch, units, units_grad, sum_grad};
}

Five class_attention_mlp_bwd(const Tensor& grad, const Tensor& pooled, const Tensors& weights,
                             const Mask& drop_attention, const Mask& drop_mlp, int64_t heads, double eps,
                             int64_t first, int64_t count) {
    const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
    const auto p = pooled_problem(pooled, weights, drop_attention, drop_mlp, heads, eps, first, count);
    return backward_mlp(p, grad, pooled, first, count);
}

Five class_attention_mlp_rows_bwd(const Tensor& grad, const Tensor& sums, const Tensors& weights,
                                  const Mask& drop_mlp, double eps) {
    const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
    const auto p = problem(sums, weights, drop_mlp, eps);
    return backward_mlp(p, grad, sums, 0, sums.size(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> class_attention_attention_bwd(
    const Tensor& sum_grad, const Tensor& pooled, const Tensors& weights, const Mask& drop_attention,
    const Mask& drop_mlp, int64_t heads, double eps, int64_t first, int64_t count,
    const Tensor& out_weight_transposed, const std::optional<Tensor>& x_grad, int64_t in_height,
    int64_t in_width) {
    const torch::stable::accelerator::DeviceGuard guard(pooled.get_device_index());
    const auto p = pooled_problem(pooled, weights, drop_attention, drop_mlp, heads, eps, first, count);
    expect(in_height / 2 == p.height && in_width / 2 == p.width, "pooled of half the height and width",
           pooled);
    const int64_t rows = count * p.num_classes;
    const auto made = [&](int64_t columns) { return empty(pooled, {rows, columns}, pooled.scalar_type()); };
    Tensor z = made(p.channels), mixture = made(p.channels), heads_grad = made(3 * p.channels);
    Tensor branch = drop_attention ? made(p.channels) : empty(pooled, {0}, pooled.scalar_type());
    class_attention::BackwardAttention b{};
    b.sum_grad = take(sum_grad, pooled, rows * p.channels, "sum_grad [rows, C]");
    b.pooled = take(pooled, pooled, pooled.numel(), "pooled contiguous and aligned");
    b.out_weight_transposed =
        take(out_weight_transposed, pooled, int64_t(p.channels) * p.channels, "out_weight transposed [C, C]");
    b.z = z.mutable_data_ptr(), b.branch = branch.mutable_data_ptr(), b.mixture = mixture.mutable_data_ptr();
    b.heads_grad = heads_grad.mutable_data_ptr();
    b.in_height = as_int(in_height, "H"), b.in_width = as_int(in_width, "W");
    const int64_t pixels = int64_t(p.batch) * p.num_classes * in_height * in_width;
    take(x_grad, pooled, pixels * p.channels, "x_grad [B, K, H, W, C]");
    b.x_grad = x_grad ? x_grad->mutable_data_ptr() : nullptr;
    check(class_attention::backward_attention(p, b, int(first), int(count), device_of(pooled),
                                              current_stream(pooled)),
          kClassAttention);
    return {z, branch, mixture, heads_grad};
}

class_attention::Attention attention(const Tensor& rows, int64_t heads) {
    expect(rows.dim() == 4 && rows.size(2) == 3 && rows.numel() > 0, "rows [N, K, 3, C]", rows);
    class_attention::Attention a{};
    a.type = type_of(rows), a.pixels = as_int(rows.size(0), "N"), a.num_classes = as_int(rows.size(1), "K");
    a.channels = as_int(rows.size(3), "C"), a.heads = as_int(heads, "heads");
    const char* reason = class_attention::unsupported(a.channels, a.heads, 8);
    STD_TORCH_CHECK(!reason, "expected ", reason ? reason : "", ", got ", heads, " heads for ",
                    describe(rows));
    as_int(int64_t(a.pixels) * (a.num_classes / class_attention::kStreamRows + 1), "tiles of classes");
    a.rows = take(rows, rows, rows.numel(), "rows contiguous and aligned");
    return a;
}

std::tuple<Tensor, Tensor> class_attention_stream_fwd(const Tensor& rows, int64_t heads) {
    const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
    auto a = attention(rows, heads);
    Tensor mixture = empty(rows, {a.pixels, a.num_classes, a.channels}, rows.scalar_type());
    Tensor log_sums = empty(rows, {a.pixels, a.heads, a.num_classes}, ScalarType::Float);
    a.mixture = mixture.mutable_data_ptr(), a.log_sums = mutable_data<float>(log_sums);
    check(class_attention::stream_forward(a, current_stream(rows)), kClassAttention);
    return {mixture, log_sums};
}

Tensor class_attention_stream_bwd(const Tensor& rows, const Tensor& mixture, const Tensor& mixture_grad,
                                  const Tensor& log_sums) {
    const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
    expect(log_sums.dim() == 3 && log_sums.scalar_type() == ScalarType::Float && log_sums.is_contiguous(),
           "log_sums [N, heads, K] float32", log_sums);
    auto a = attention(rows, log_sums.size(1));
    const int64_t tokens = int64_t(a.pixels) * a.num_classes;
    expect(log_sums.numel() == tokens * a.heads, "log_sums of all rows", log_sums);
    a.mixture = const_cast<void*>(take(mixture, rows, tokens * a.channels, "mixture [N, K, C]"));
    a.mixture_grad = take(mixture_grad, rows, tokens * a.channels, "mixture_grad [N, K, C]");
    a.log_sums = const_cast<float*>(data<float>(log_sums));
    Tensor statistics = empty(rows, {a.pixels, a.heads, a.num_classes, 2}, ScalarType::Float);
    Tensor rows_grad = torch::stable::empty_like(rows);
    a.statistics = reinterpret_cast<Statistics*>(mutable_data<float>(statistics));
    a.rows_grad = rows_grad.mutable_data_ptr();
    check(class_attention::stream_backward(a, current_stream(rows)), kClassAttention);
    return rows_grad;
}

}  // namespace
}  // namespace errseg

// What errseg/ops/cuda/class_attention.py is made of.
STABLE_TORCH_LIBRARY_FRAGMENT(errseg, m) {
    m.def("class_attention_cuda_most_classes(Tensor like, int num_heads, int hidden) -> int");
    m.def(
        "class_attention_cuda_fwd(Tensor x, Tensor[] weights, Tensor? drop_attention, Tensor? drop_mlp, int "
        "num_heads, "
        "float eps, bool training) -> (Tensor, Tensor)");
    m.def(
        "class_attention_cuda_mlp_fwd(Tensor sums, Tensor[] weights, Tensor? drop_mlp, float eps) -> Tensor");
    m.def(
        "class_attention_cuda_mlp_bwd(Tensor grad, Tensor pooled, Tensor[] weights, Tensor? drop_attention, "
        "Tensor? "
        "drop_mlp, int num_heads, float eps, int first, int count) -> (Tensor, Tensor, Tensor, Tensor, "
        "Tensor)");
    m.def(
        "class_attention_cuda_mlp_rows_bwd(Tensor grad, Tensor sums, Tensor[] weights, Tensor? drop_mlp, "
        "float eps) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "class_attention_cuda_attention_bwd(Tensor sum_grad, Tensor pooled, Tensor[] weights, Tensor? "
        "drop_attention, "
        "Tensor? "
        "drop_mlp, int num_heads, float eps, int first, int count, Tensor out_weight_transposed, Tensor(a!)? "
        "x_grad, "
        "int in_height, int in_width) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("class_attention_cuda_stream_fwd(Tensor rows, int num_heads) -> (Tensor, Tensor)");
    m.def(
        "class_attention_cuda_stream_bwd(Tensor rows, Tensor mixture, Tensor mixture_grad, Tensor log_sums) "
        "-> "
        "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(errseg, CUDA, m) {
    m.impl("class_attention_cuda_most_classes", TORCH_BOX(&errseg::most_classes));
    m.impl("class_attention_cuda_fwd", TORCH_BOX(&errseg::class_attention_fwd));
    m.impl("class_attention_cuda_mlp_fwd", TORCH_BOX(&errseg::class_attention_mlp_fwd));
    m.impl("class_attention_cuda_mlp_bwd", TORCH_BOX(&errseg::class_attention_mlp_bwd));
    m.impl("class_attention_cuda_mlp_rows_bwd", TORCH_BOX(&errseg::class_attention_mlp_rows_bwd));
    m.impl("class_attention_cuda_attention_bwd", TORCH_BOX(&errseg::class_attention_attention_bwd));
    m.impl("class_attention_cuda_stream_fwd", TORCH_BOX(&errseg::class_attention_stream_fwd));
    m.impl("class_attention_cuda_stream_bwd", TORCH_BOX(&errseg::class_attention_stream_bwd));
}
