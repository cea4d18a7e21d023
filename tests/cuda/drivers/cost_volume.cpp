#include "cost_volume/cost_volume.cuh"

#include "driver.h"

namespace {

namespace op = errseg::cost_volume;
static_assert(int64_t(errseg::Number::kBFloat16) == driver::kBFloat16);

// The leading arguments of every call.
op::Problem make(int64_t image_type, int64_t word_type, const void* images, const void* words,
                 const int64_t* class_ids, const int64_t* strides, const int64_t* sizes, float* pixel_scales,
                 float* word_scales) {
    op::Problem problem{};
    problem.images = {images, errseg::Number(image_type)}, problem.words = {words, errseg::Number(word_type)};
    problem.class_ids = class_ids;
    problem.image_stride = strides[0], problem.channel_stride = strides[1], problem.pixel_stride = strides[2];
    problem.word_stride = strides[3];
    problem.batch = int(sizes[0]), problem.channels = int(sizes[1]), problem.num_pixels = int(sizes[2]);
    problem.num_classes = int(sizes[3]);
    problem.pixel_scales = pixel_scales, problem.word_scales = word_scales;
    return problem;
}

}  // namespace

#define PROBLEM                                                                                             \
    int64_t image_type, int64_t word_type, const void *images, const void *words, const int64_t *class_ids, \
        const int64_t *strides, const int64_t *sizes, float *pixel_scales, float *word_scales
#define MADE make(image_type, word_type, images, words, class_ids, strides, sizes, pixel_scales, word_scales)

extern "C" const char* forward(int64_t seed, PROBLEM, void* costs) {
    return driver::guarded(seed, [&] { return op::forward(MADE, costs, nullptr); });
}

extern "C" const char* backward_pixels(int64_t seed, PROBLEM, const void* grads, void* pixel_grads) {
    return driver::guarded(seed, [&] { return op::backward_pixels(MADE, grads, pixel_grads, nullptr); });
}

extern "C" const char* backward_words(int64_t seed, PROBLEM, const void* grads, void* word_grads,
                                      int64_t multiprocessors) {
    return driver::guarded(seed, [&] {
        const op::Problem problem = MADE;
        const op::Splits splits = op::make_splits(problem, int(multiprocessors));
        const size_t numbers = size_t(problem.pairs()) * splits.count * problem.channels;
        const std::unique_ptr<float[]> unit_grads(new float[numbers]);
        const std::unique_ptr<int[]> order(new int[2 * problem.pairs()]);
        std::memset(unit_grads.get(), 0xFF, numbers * sizeof(float));
        std::memset(order.get(), 0xFF, 2 * problem.pairs() * sizeof(int));
        return op::backward_words(problem, splits, grads, unit_grads.get(), order.get(), word_grads, nullptr);
    });
}

// Pixels per split, and how many splits, of a problem.
extern "C" const char* splits(int64_t type, const int64_t* sizes, int64_t multiprocessors, int64_t* result) {
    const int64_t strides[4] = {};
    const op::Problem problem = make(type, type, nullptr, nullptr, nullptr, strides, sizes, nullptr, nullptr);
    const op::Splits splits = op::make_splits(problem, int(multiprocessors));
    result[0] = splits.pixels, result[1] = splits.count;
    return nullptr;
}
