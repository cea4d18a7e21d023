#include "spatial_attention/spatial_attention.cuh"

#include <optional>
#include <tuple>

#include "common/halves_cuda.cuh"

namespace errseg {
namespace {

constexpr const char* kOp = "spatial_attention";

// The maps [.., H, W, C] of a call.
spatial_attention::Problem problem(const Tensor& x, int64_t window, double eps) {
    expect(x.dim() >= 4, "x [.., H, W, C]", x);
    spatial_attention::Problem p{};
    const int64_t dim = x.dim(), height = x.size(dim - 3), width = x.size(dim - 2);
    p.type = type_of(x), p.x = take(x, x, x.numel(), "x contiguous and aligned");
    p.height = as_int(height, "H"), p.width = as_int(width, "W"), p.channels = as_int(x.size(dim - 1), "C");
    expect(x.numel() > 0 && window > 0 && height >= window && width >= window, "maps that hold windows", x);
    p.maps = as_int(x.numel() / (height * width * p.channels), "B x K");
    p.num_classes = as_int(x.size(dim - 4), "K"), p.heads = 1, p.window = int(window), p.eps = float(eps);
    expect(height * width * p.channels < INT_MAX / 4, "maps of less than 2^29 numbers", x);
    expect(p.channels % 16 == 0 && p.channels <= kMaxChannels, "channels in multiples of 16, up to 256", x);
    as_int(int64_t(p.maps) * p.num_tokens(), "B x K x H x W");
    return p;
}

spatial_attention::Problem problem(const Tensor& x, const Tensor& query_map, const Tensor& key,
                                   const Tensor& value, const Tensor& query_weight, int64_t heads,
                                   int64_t window, double eps) {
    expect(x.dim() == 5, "x [B, K, H, W, C]", x);
    spatial_attention::Problem p = problem(x, window, eps);
    const int64_t keys = int64_t(p.maps) * p.num_keys() * p.channels;
    p.heads = as_int(heads, "heads");
    const char* reason = unsupported(p.channels, p.heads);
    STD_TORCH_CHECK(!reason, "expected ", reason ? reason : "", ", got ", heads, " heads for ", describe(x));
    p.query_map = take(query_map, x, x.numel() / p.num_classes, "query_map [B, H, W, C]");
    p.key = take(key, x, keys, "key [B, K, N_kv, C]"),
    p.value = take(value, x, keys, "value [B, K, N_kv, C]");
    p.query_weight = take(query_weight, x, int64_t(p.channels) * p.channels, "query_weight [C, C]");
    return p;
}

// Two blocks to a multiprocessor; each costs a kilobyte of its shared memory.
int shared_room(const Tensor& x) {
    int bytes = 0;
    const auto device = x.get_device_index();
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), kOp);
    return bytes / 2 - 1024;
}

std::tuple<Tensor, Tensor, Tensor> attend(const Tensor& x, const Tensor& query_map, const Tensor& key,
                                          const Tensor& value, const Tensor& query_weight,
                                          const Tensor& out_weight, const Tensor& out_bias,
                                          const std::optional<Tensor>& drop_path, int64_t heads,
                                          int64_t window, double eps, bool training) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const auto p = problem(x, query_map, key, value, query_weight, heads, window, eps);
    Tensor out = torch::stable::empty_like(x);
    Tensor mixture = training ? torch::stable::empty_like(x) : empty(x, {0}, x.scalar_type());
    Tensor log_sums = training ? empty(x, {x.size(0), x.size(1), heads, p.num_tokens()}, ScalarType::Float)
                               : empty(x, {0}, ScalarType::Float);
    spatial_attention::Forward f{};
    f.out_weight = take(out_weight, x, int64_t(p.channels) * p.channels, "out_weight [C, C]");
    f.out_bias = take(out_bias, x, p.channels, "out_bias [C]");
    f.drop_path = take(drop_path, x, p.maps, "drop_path [B, K]");
    f.out = out.mutable_data_ptr();
    if (training) f.mixture = mixture.mutable_data_ptr(), f.log_sums = mutable_data<float>(log_sums);
    check(spatial_attention::forward(p, f, shared_room(x), current_stream(x)), kOp);
    return {out, mixture, log_sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_bwd(const Tensor& grad, const Tensor& x,
                                                      const Tensor& query_map, const Tensor& key,
                                                      const Tensor& value, const Tensor& query_weight,
                                                      const Tensor& out_weight_transposed,
                                                      const Tensor& mixture, const Tensor& log_sums,
                                                      int64_t window, double eps) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    expect(log_sums.dim() == 4 && log_sums.scalar_type() == ScalarType::Float && log_sums.is_contiguous(),
           "log_sums [B, K, heads, T] float32", log_sums);
    const auto p = problem(x, query_map, key, value, query_weight, log_sums.size(2), window, eps);
    expect(log_sums.numel() == int64_t(p.maps) * p.heads * p.num_tokens(), "log_sums of all tokens",
           log_sums);
    const auto tokens = [&] {
        return empty(x, {x.size(0), x.size(1), p.num_tokens(), p.channels}, x.scalar_type());
    };
    Tensor z = tokens(), query = tokens(), mixture_grad = tokens(), query_grad = tokens();
    Tensor deltas = torch::stable::empty_like(log_sums);
    Tensor key_grad = torch::stable::empty_like(key), value_grad = torch::stable::empty_like(value);
    spatial_attention::Backward b{};
    b.grad = take(grad, x, x.numel(), "grad like x");
    b.out_weight_transposed =
        take(out_weight_transposed, x, int64_t(p.channels) * p.channels, "out_weight transposed [C, C]");
    b.mixture = take(mixture, x, x.numel(), "mixture like x"), b.log_sums = data<float>(log_sums);
    b.z = z.mutable_data_ptr(), b.query = query.mutable_data_ptr();
    b.mixture_grad = mixture_grad.mutable_data_ptr(), b.query_grad = query_grad.mutable_data_ptr();
    b.deltas = mutable_data<float>(deltas);
    b.key_grad = key_grad.mutable_data_ptr(), b.value_grad = value_grad.mutable_data_ptr();
    check(spatial_attention::backward(p, b, shared_room(x), current_stream(x)), kOp);
    return {z, query_grad, key_grad, value_grad};
}

Tensor windows(const Tensor& x, int64_t window, double eps) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const auto p = problem(x, window, eps);
    const int64_t area = window * window;
    Tensor result = empty(x, {int64_t(p.maps) * p.num_keys(), area * p.channels}, x.scalar_type());
    check(spatial_attention::make_windows(p, result.mutable_data_ptr(), current_stream(x)), kOp);
    return result;
}

Tensor pixels(const Tensor& grad, const Tensor& x, const Tensor& z_grad, int64_t window, double eps) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const auto p = problem(x, window, eps);
    Tensor result = torch::stable::empty_like(x);
    const int64_t tokens = int64_t(p.maps) * p.num_tokens() * p.channels;
    check(spatial_attention::backward_pixels(p, take(grad, x, x.numel(), "grad like x"),
                                             take(z_grad, x, tokens, "z_grad [B, K, T, C]"),
                                             result.mutable_data_ptr(), current_stream(x)),
          kOp);
    return result;
}

// In place; `added` is [columns], [keys, columns] or [images, keys, columns].
void rows(const Tensor& reduced, const Tensor& added, double eps, const std::optional<Tensor>& gradient) {
    const torch::stable::accelerator::DeviceGuard guard(reduced.get_device_index());
    expect(reduced.dim() == 2 && reduced.size(1) % 2 == 0 && reduced.size(1) <= 2 * kMaxChannels,
           "rows of up to 512 columns", reduced);
    expect(added.dim() >= 1 && added.size(added.dim() - 1) == reduced.size(1), "added [.., columns]", added);
    spatial_attention::Reduced r{};
    r.type = type_of(reduced), r.rows = reduced.size(0), r.columns = int(reduced.size(1)), r.eps = float(eps);
    as_int(r.rows, "rows");
    r.per_key = added.dim() > 1;
    r.num_keys = r.per_key ? as_int(added.size(added.dim() - 2), "keys") : 1;
    const int64_t images = added.dim() > 2 ? added.size(0) : 1;
    r.num_classes = as_int(r.rows / (images * r.num_keys), "K");
    expect(!r.per_key || images * r.num_classes * r.num_keys == r.rows, "added for all rows", added);
    r.added = take(added, reduced, added.numel(), "added contiguous and aligned");
    take(reduced, reduced, reduced.numel(), "rows contiguous and aligned");
    take(gradient, reduced, reduced.numel(), "gradient like rows");
    check(spatial_attention::normalize_rows(r, reduced.mutable_data_ptr(),
                                            gradient ? gradient->mutable_data_ptr() : nullptr,
                                            current_stream(reduced)),
          kOp);
}

}  // namespace
}  // namespace errseg

// What errseg/ops/cuda/spatial_attention.py is made of.
STABLE_TORCH_LIBRARY_FRAGMENT(errseg, m) {
    m.def(
        "spatial_attention_cuda_attend(Tensor x, Tensor query_map, Tensor key, Tensor value, "
        "Tensor query_weight, Tensor out_weight, Tensor out_bias, Tensor? drop_path, int num_heads, int "
        "window, "
        "float eps, bool training) -> (Tensor, Tensor, Tensor)");
    m.def(
        "spatial_attention_cuda_attend_bwd(Tensor grad, Tensor x, Tensor query_map, Tensor key, Tensor "
        "value, "
        "Tensor query_weight, Tensor out_weight_transposed, Tensor mixture, Tensor log_sums, int window, "
        "float eps) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("spatial_attention_cuda_windows(Tensor x, int window, float eps) -> Tensor");
    m.def(
        "spatial_attention_cuda_pixels(Tensor grad, Tensor x, Tensor z_grad, int window, float eps) -> "
        "Tensor");
    m.def(
        "spatial_attention_cuda_rows(Tensor(a!) reduced, Tensor added, float eps, Tensor(b!)? gradient) -> "
        "()");
}

STABLE_TORCH_LIBRARY_IMPL(errseg, CUDA, m) {
    m.impl("spatial_attention_cuda_attend", TORCH_BOX(&errseg::attend));
    m.impl("spatial_attention_cuda_attend_bwd", TORCH_BOX(&errseg::attend_bwd));
    m.impl("spatial_attention_cuda_windows", TORCH_BOX(&errseg::windows));
    m.impl("spatial_attention_cuda_pixels", TORCH_BOX(&errseg::pixels));
    m.impl("spatial_attention_cuda_rows", TORCH_BOX(&errseg::rows));
}
