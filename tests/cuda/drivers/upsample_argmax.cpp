#include "upsample_argmax/upsample_argmax.cuh"

#include "driver.h"

extern "C" const char* upsample_argmax(int64_t seed, int64_t type, const void* logits,
                                       const int64_t* class_ids, int32_t* labels, void* scores, int64_t batch,
                                       int64_t classes, int64_t in_y, int64_t in_x, int64_t out_y,
                                       int64_t out_x) {
    return driver::guarded(seed, [&] {
        return driver::visit(type, [&](auto number) {
            using T = decltype(number);
            using S = errseg::accumulator_t<T>;
            const errseg::upsample_argmax::Problem<T> problem{static_cast<const T*>(logits),
                                                              class_ids,
                                                              labels,
                                                              static_cast<S*>(scores),
                                                              int(batch),
                                                              int(classes),
                                                              {int(in_y), int(out_y)},
                                                              {int(in_x), int(out_x)}};
            return errseg::upsample_argmax::run(problem, nullptr);
        });
    });
}
