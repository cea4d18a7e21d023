#include "common/stable_cuda.cuh"
#include "upsample_argmax/upsample_argmax.cuh"

namespace errseg {
namespace {

std::tuple<Tensor, Tensor> upsample_argmax_cuda(const Tensor& logits_in, const Tensor& class_ids_in,
                                                int64_t height, int64_t width, bool return_scores) {
    expect(logits_in.dim() == 4 && (logits_in.size(0) == 0 || logits_in.numel() > 0),
           "logits [B, K, h, w] of at least one class and pixel", logits_in);
    expect(class_ids_in.dim() == 2 && class_ids_in.size(0) == logits_in.size(0) &&
               class_ids_in.size(1) == logits_in.size(1) && class_ids_in.scalar_type() == ScalarType::Long,
           "class_ids [B, K] int64", class_ids_in);
    expect_same_device(logits_in, class_ids_in, "class_ids");
    expect(logits_in.size(0) <= 65535, "at most 65535 images", logits_in);
    STD_TORCH_CHECK(height > 0 && width > 0, "expected a size of at least 1 x 1, got ", height, " x ", width);

    const torch::stable::accelerator::DeviceGuard guard(logits_in.get_device_index());
    const Tensor logits = as_contiguous(logits_in), class_ids = as_contiguous(class_ids_in);
    const int64_t batch = logits.size(0);
    Tensor labels = empty(logits, {batch, height, width}, ScalarType::Int);
    Tensor scores = return_scores ? empty(logits, {batch, height, width}, score_dtype(logits))
                                  : empty(logits, {0}, score_dtype(logits));
    visit_device_floating(logits, "logits", [&](auto tag) {
        using T = typename decltype(tag)::type;
        const upsample_argmax::Problem<T> problem{
            data<T>(logits),
            data<int64_t>(class_ids),
            mutable_data<int32_t>(labels),
            return_scores ? mutable_data<accumulator_t<T>>(scores) : nullptr,
            as_int(batch, "B"),
            as_int(logits.size(1), "K"),
            {as_int(logits.size(2), "h"), as_int(height, "H")},
            {as_int(logits.size(3), "w"), as_int(width, "W")}};
        check(upsample_argmax::run(problem, current_stream(logits)), "upsample_argmax");
    });
    return {labels, scores};
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CUDA, m) {
    m.impl("upsample_argmax_cuda", TORCH_BOX(&errseg::upsample_argmax_cuda));
}
