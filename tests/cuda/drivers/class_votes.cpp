#include "class_votes/class_votes.cuh"

#include "driver.h"

extern "C" const char* class_votes(int64_t seed, int64_t pixel_type, int64_t word_type, const void* pixels,
                                   const void* words, int64_t word_stride, int64_t* votes, int64_t batch,
                                   int64_t channels, int64_t num_pixels, int64_t num_words,
                                   int64_t multiprocessors, int64_t most_tiles) {
    namespace op = errseg::class_votes;
    static_assert(int64_t(errseg::Number::kBFloat16) == driver::kBFloat16);
    return driver::guarded(seed, [&] {
        op::Problem problem{{pixels, errseg::Number(pixel_type)},
                            {words, errseg::Number(word_type)},
                            int(word_stride),
                            int(batch),
                            int(channels),
                            int(num_pixels),
                            int(num_words),
                            reinterpret_cast<unsigned long long*>(votes),
                            nullptr};
        op::Plan plan(problem, int(multiprocessors));
        if (most_tiles) plan.tiles_per_launch = std::min<int>(plan.tiles_per_launch, most_tiles);
        const std::unique_ptr<char[]> scratch(new char[plan.scratch_bytes()]);
        std::memset(scratch.get(), 0xFF, plan.scratch_bytes());
        problem.scratch = scratch.get();
        return op::run(problem, plan, nullptr);
    });
}

// Bytes of scratch and blocks per launch that a problem would take.
extern "C" const char* plan(int64_t batch, int64_t num_pixels, int64_t num_words, int64_t multiprocessors,
                            int64_t* result) {
    errseg::class_votes::Problem problem{};
    problem.batch = int(batch), problem.num_pixels = int(num_pixels), problem.num_words = int(num_words);
    const errseg::class_votes::Plan plan(problem, int(multiprocessors));
    result[0] = int64_t(plan.scratch_bytes());
    result[1] = int64_t(plan.tiles_per_launch) * plan.slices;
    result[2] = int64_t(plan.slices) * plan.words_per_slice;
    return nullptr;
}
