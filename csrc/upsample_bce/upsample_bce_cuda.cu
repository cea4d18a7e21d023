#include "common/stable_cuda.cuh"
#include "upsample_bce/upsample_bce.cuh"

namespace errseg {
namespace {

upsample_bce::Integers integers(const Tensor& tensor) {
    upsample_bce::Integers result{};
    visit_integer(tensor, "target", [&](auto tag) {
        using T = typename decltype(tag)::type;
        result = {tensor.const_data_ptr(), sizeof(T), std::is_signed_v<T>};
    });
    return result;
}

std::tuple<Tensor, Tensor> upsample_bce_cuda(const Tensor& logits_in, const Tensor& class_ids_in,
                                             const Tensor& target_in, int64_t vocabulary_size,
                                             int64_t ignore_index, bool exclude_ignored, bool training) {
    expect(logits_in.dim() == 4 && (logits_in.size(0) == 0 || logits_in.size(2) * logits_in.size(3) > 0),
           "logits [B, K, h, w] of at least 1 x 1", logits_in);
    const int64_t batch = logits_in.size(0), num_classes = logits_in.size(1);
    expect(class_ids_in.dim() == 2 && class_ids_in.size(0) == batch && class_ids_in.size(1) == num_classes &&
               class_ids_in.scalar_type() == ScalarType::Long,
           "class_ids [B, K] int64", class_ids_in);
    expect(target_in.dim() == 3 && target_in.size(0) == batch, "target [B, H, W]", target_in);
    expect_same_device(logits_in, class_ids_in, "class_ids");
    expect_same_device(logits_in, target_in, "target");
    STD_TORCH_CHECK(vocabulary_size > 0, "expected a vocabulary_size of at least 1, got ", vocabulary_size);

    const torch::stable::accelerator::DeviceGuard guard(logits_in.get_device_index());
    const Tensor logits = as_contiguous(logits_in), class_ids = as_contiguous(class_ids_in),
                 target = as_contiguous(target_in);
    const int64_t height = logits.size(2), width = logits.size(3);
    const ScalarType dtype = score_dtype(logits);
    Tensor loss = empty(logits, {}, dtype);
    Tensor gradient =
        training ? empty(logits, {batch, num_classes, height, width}, dtype) : empty(logits, {0}, dtype);
    if (target.numel() == 0) {
        torch::stable::zero_(loss);
        torch::stable::zero_(gradient);
        return {loss, gradient};
    }
    Tensor num_valid = empty(logits, {1}, ScalarType::Long);
    if (training && exclude_ignored) torch::stable::zero_(num_valid);

    visit_device_floating(logits, "logits", [&](auto tag) {
        using T = typename decltype(tag)::type;
        using S = accumulator_t<T>;
        upsample_bce::Problem<T> problem({as_int(height, "h"), as_int(target.size(1), "H")},
                                         {as_int(width, "w"), as_int(target.size(2), "W")});
        problem.logits = data<T>(logits);
        problem.class_ids = data<int64_t>(class_ids);
        problem.target = integers(target);
        problem.loss = mutable_data<S>(loss);
        problem.gradient = training ? mutable_data<S>(gradient) : nullptr;
        problem.num_valid = static_cast<unsigned long long*>(num_valid.mutable_data_ptr());
        problem.batch = as_int(batch, "B"), problem.classes = as_int(num_classes, "K");
        problem.vocabulary_size = vocabulary_size, problem.ignore_index = ignore_index;
        problem.exclude_ignored = exclude_ignored;
        const dim3 grid = problem.grid();
        expect(grid.y <= 65535 && grid.z <= 65535 && problem.num_blocks() <= INT_MAX,
               "fewer logits: the grid of blocks is too large", logits);
        const int64_t share_bytes = int64_t(problem.num_blocks() * sizeof(upsample_bce::Share));
        Tensor shares = empty(logits, {share_bytes / 8}, ScalarType::Long);
        problem.shares = static_cast<upsample_bce::Share*>(shares.mutable_data_ptr());
        check(upsample_bce::run(problem, current_stream(logits)), "upsample_bce");
    });
    return {loss, gradient};
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CUDA, m) {
    m.impl("upsample_bce_cuda", TORCH_BOX(&errseg::upsample_bce_cuda));
}
