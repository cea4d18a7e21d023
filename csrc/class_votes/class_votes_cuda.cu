#include "class_votes/class_votes.cuh"
#include "common/stable_cuda.cuh"

namespace errseg {
namespace {

class_votes::Embeddings embeddings(const Tensor& tensor, const char* name) {
    class_votes::Embeddings result{};
    visit_device_floating(tensor, name, [&](auto tag) {
        result = {tensor.const_data_ptr(), number_of<typename decltype(tag)::type>};
    });
    return result;
}

Tensor class_votes_cuda(const Tensor& image_in, const Tensor& text_in) {
    expect(image_in.dim() == 4, "image_embeddings [B, D, H, W]", image_in);
    expect(text_in.dim() == 2 && text_in.size(0) > 0 && text_in.size(1) == image_in.size(1),
           "text_embeddings [T, D] of at least one word", text_in);
    expect_same_device(image_in, text_in, "text_embeddings");

    const torch::stable::accelerator::DeviceGuard guard(image_in.get_device_index());
    // [B, H, W, D]: as the backbone lays them out, else a copy.
    const Tensor channels_last = torch::stable::transpose(torch::stable::transpose(image_in, 1, 2), 2, 3);
    const Tensor image = as_contiguous(channels_last), text = with_contiguous_rows(text_in);
    Tensor votes = empty(image, {image.size(0), text.size(0)}, ScalarType::Long);
    torch::stable::zero_(votes);

    class_votes::Problem problem{};
    problem.pixels = embeddings(image, "image_embeddings");
    problem.words = embeddings(text, "text_embeddings");
    problem.word_stride = as_int(text.stride(0), "the stride of text_embeddings");
    problem.batch = as_int(image.size(0), "B"), problem.channels = as_int(image.size(3), "D");
    problem.num_pixels = as_int(image.size(1) * image.size(2), "H x W");
    problem.num_words = as_int(text.size(0), "T");
    problem.votes = static_cast<unsigned long long*>(votes.mutable_data_ptr());
    as_int(image.size(0) * problem.num_pixels, "B x H x W");
    if (problem.batch == 0 || problem.num_pixels == 0) return votes;

    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, image.get_device_index()),
          "class_votes");
    const class_votes::Plan plan(problem, multiprocessors);
    Tensor scratch = empty(image, {int64_t(plan.scratch_bytes() / sizeof(int))}, ScalarType::Int);
    problem.scratch = scratch.mutable_data_ptr();
    check(class_votes::run(problem, plan, current_stream(image)), "class_votes");
    return votes;
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CUDA, m) {
    m.impl("class_votes_cuda", TORCH_BOX(&errseg::class_votes_cuda));
}
