#include "cost_volume/cost_volume.cuh"

#include <optional>
#include <tuple>
#include <vector>

#include "common/stable_cuda.cuh"

namespace errseg {
namespace {

constexpr const char* kOp = "cost_volume";

Numbers numbers(const Tensor& tensor, const char* name) {
    Numbers result{};
    visit_device_floating(tensor, name, [&](auto tag) {
        using T = typename decltype(tag)::type;
        expect(!std::is_same_v<T, double>, "float32, float16 or bfloat16", tensor);
        result = {tensor.const_data_ptr(), number_of<T>};
    });
    return result;
}

// The tensors of a call, read as they lie where pixels or channels, and a word's numbers, are neighbours.
struct Call {
    Tensor images, words;
    std::optional<Tensor> class_ids;
    cost_volume::Problem problem{};

    Call(const Tensor& images_in, const Tensor& words_in, const std::optional<Tensor>& class_ids_in)
        : images(images_in), words(with_contiguous_rows(words_in)) {
        expect(images.dim() == 4, "image_embeddings [B, D, H, W]", images);
        expect(words.dim() == 2 && words.size(1) == images.size(1), "text_embeddings [T, D]", words);
        expect_same_device(images, words, "text_embeddings");
        if (class_ids_in) {
            expect(class_ids_in->dim() == 2 && class_ids_in->size(0) == images.size(0) &&
                       class_ids_in->scalar_type() == ScalarType::Long,
                   "class_ids [B, K] int64", *class_ids_in);
            expect_same_device(images, *class_ids_in, "class_ids");
            class_ids = as_contiguous(*class_ids_in);
            problem.class_ids = data<int64_t>(*class_ids);
        }
        find_pixels();
        problem.images = numbers(images, "image_embeddings");
        problem.words = numbers(words, "text_embeddings"), problem.word_stride = words.stride(0);
        problem.batch = as_int(images.size(0), "B"), problem.channels = as_int(images.size(1), "D");
        problem.num_pixels = as_int(images.size(2) * images.size(3), "H x W");
        problem.num_classes = as_int(class_ids ? class_ids->size(1) : words.size(0), "K");
        as_int(images.size(0) * problem.num_classes, "B x K");
        as_int(images.size(0) * problem.num_pixels, "B x H x W");
        expect(problem.batch <= 65535 && problem.num_classes <= 65535 * cost_volume::kWords,
               "fewer images or classes: the grid of blocks is too large", images);
    }

    bool empty() const {
        return !problem.batch || !problem.num_pixels || !problem.num_classes || !problem.channels;
    }

    void set_scales(const Tensor& pixel_scales, const Tensor& word_scales) {
        problem.pixel_scales = mutable_data<float>(pixel_scales);
        problem.word_scales = mutable_data<float>(word_scales);
    }

  private:
    void find_pixels() {
        const int64_t height = images.size(2), width = images.size(3);
        const int64_t pixel_stride = images.stride(width > 1 ? 3 : 2);
        const bool lines = height <= 1 || width <= 1 || images.stride(2) == width * pixel_stride;
        if (lines && (pixel_stride == 1 || images.stride(1) == 1)) {
            problem.image_stride = images.stride(0);
            problem.channel_stride = images.stride(1), problem.pixel_stride = pixel_stride;
        } else {
            images = torch::stable::contiguous(images);
            problem.image_stride = images.size(1) * height * width;
            problem.channel_stride = height * width, problem.pixel_stride = 1;
        }
    }
};

std::tuple<Tensor, Tensor, Tensor> cost_volume_cuda(const Tensor& images, const Tensor& words,
                                                    const std::optional<Tensor>& class_ids, bool training) {
    const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
    Call call(images, words, class_ids);
    cost_volume::Problem& problem = call.problem;
    const auto scales = [&](int64_t size) {
        return training ? empty(images, {images.size(0), size}, ScalarType::Float)
                        : empty(images, {0}, ScalarType::Float);
    };
    Tensor costs = empty(images, {images.size(0), problem.num_classes, images.size(2), images.size(3)},
                         images.scalar_type());
    Tensor pixel_scales = scales(problem.num_pixels), word_scales = scales(problem.num_classes);
    if (call.empty()) {
        torch::stable::zero_(costs);
        return {costs, pixel_scales, word_scales};
    }
    if (training) call.set_scales(pixel_scales, word_scales);
    check(cost_volume::forward(problem, costs.mutable_data_ptr(), current_stream(images)), kOp);
    return {costs, pixel_scales, word_scales};
}

Tensor backward_words(const Call& call, const Tensor& grad) {
    const cost_volume::Problem& problem = call.problem;
    const auto zeros = [&] {
        return torch::stable::new_zeros(call.words, {call.words.size(0), problem.channels});
    };
    if (call.empty()) return zeros();
    Tensor word_grads =
        call.class_ids ? zeros()
                       : empty(call.words, {call.words.size(0), problem.channels}, call.words.scalar_type());
    int multiprocessors = 0;
    const auto device = call.images.get_device_index();
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), kOp);
    const cost_volume::Splits splits = cost_volume::make_splits(problem, multiprocessors);
    Tensor unit_grads = empty(grad, {problem.pairs(), splits.count, problem.channels}, ScalarType::Float);
    Tensor order = empty(grad, {2, call.class_ids ? problem.pairs() : 0}, ScalarType::Int);
    check(cost_volume::backward_words(problem, splits, grad.const_data_ptr(), mutable_data<float>(unit_grads),
                                      mutable_data<int>(order), word_grads.mutable_data_ptr(),
                                      current_stream(grad)),
          kOp);
    return word_grads;
}

std::vector<Tensor> cost_volume_cuda_bwd(const Tensor& grad_in, const Tensor& images, const Tensor& words,
                                         const std::optional<Tensor>& class_ids, const Tensor& pixel_scales,
                                         const Tensor& word_scales, const std::vector<bool>& needed) {
    const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
    Call call(images, words, class_ids);
    expect(grad_in.dim() == 4 && grad_in.size(1) == call.problem.num_classes &&
               grad_in.scalar_type() == images.scalar_type(),
           "grad [B, K, H, W] like image_embeddings", grad_in);
    expect_same_device(images, grad_in, "grad");
    const Tensor grad = as_contiguous(grad_in);
    call.set_scales(pixel_scales, word_scales);
    std::vector<Tensor> grads{empty(images, {0}, images.scalar_type()),
                              empty(words, {0}, words.scalar_type())};
    if (needed[0]) {
        grads[0] = empty(images, {images.size(0), images.size(1), images.size(2), images.size(3)},
                         images.scalar_type());
        if (call.empty()) {
            torch::stable::zero_(grads[0]);
        } else {
            check(cost_volume::backward_pixels(call.problem, grad.const_data_ptr(),
                                               grads[0].mutable_data_ptr(), current_stream(grad)),
                  kOp);
        }
    }
    if (needed[1]) grads[1] = backward_words(call, grad);
    return grads;
}

}  // namespace
}  // namespace errseg

STABLE_TORCH_LIBRARY_IMPL(errseg, CUDA, m) {
    m.impl("cost_volume_cuda", TORCH_BOX(&errseg::cost_volume_cuda));
    m.impl("cost_volume_cuda_bwd", TORCH_BOX(&errseg::cost_volume_cuda_bwd));
}
