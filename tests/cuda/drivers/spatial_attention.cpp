#include "spatial_attention/spatial_attention.cuh"

#include "driver.h"

namespace op = errseg::spatial_attention;
static_assert(int64_t(errseg::Number::kBFloat16) == driver::kBFloat16);

// Maps, classes of an image, height, width, channels, heads, window.
static op::Problem make(int64_t type, const int64_t* sizes, const float* eps, const void* x,
                        const void* query_map, const void* key, const void* value, const void* query_weight) {
    return {errseg::Number(type),
            x,
            query_map,
            key,
            value,
            query_weight,
            int(sizes[0]),
            int(sizes[1]),
            int(sizes[2]),
            int(sizes[3]),
            int(sizes[4]),
            int(sizes[5]),
            int(sizes[6]),
            *eps};
}

#define PROBLEM                                                                                 \
    int64_t type, const int64_t *sizes, const float *eps, const void *x, const void *query_map, \
        const void *key, const void *value, const void *query_weight
#define MADE make(type, sizes, eps, x, query_map, key, value, query_weight)

extern "C" const char* forward(int64_t seed, int64_t room, PROBLEM, const void* out_weight,
                               const void* out_bias, const void* drop_path, void* out, void* mixture,
                               float* log_sums) {
    return driver::guarded(seed, [&] {
        return op::forward(MADE, {out_weight, out_bias, drop_path, out, mixture, log_sums}, int(room),
                           nullptr);
    });
}

extern "C" const char* backward(int64_t seed, int64_t room, PROBLEM, const void* grad,
                                const void* out_weight_transposed, const void* mixture, const float* log_sums,
                                void* z, void* query, void* mixture_grad, void* query_grad, float* deltas,
                                void* key_grad, void* value_grad) {
    return driver::guarded(seed, [&] {
        const op::Backward b{grad,      out_weight_transposed, mixture,    log_sums, z,
                             query,     mixture_grad,          query_grad, deltas,   key_grad,
                             value_grad};
        return op::backward(MADE, b, int(room), nullptr);
    });
}

extern "C" const char* windows(int64_t seed, int64_t type, const int64_t* sizes, const float* eps,
                               const void* x, void* result) {
    return driver::guarded(seed, [&] {
        return op::make_windows(make(type, sizes, eps, x, nullptr, nullptr, nullptr, nullptr), result,
                                nullptr);
    });
}

extern "C" const char* pixels(int64_t seed, int64_t type, const int64_t* sizes, const float* eps,
                              const void* x, const void* grad, const void* z_grad, void* x_grad) {
    return driver::guarded(seed, [&] {
        const op::Problem problem = make(type, sizes, eps, x, nullptr, nullptr, nullptr, nullptr);
        return op::backward_pixels(problem, grad, z_grad, x_grad, nullptr);
    });
}

extern "C" const char* rows(int64_t seed, int64_t type, const float* eps, int64_t num_rows, int64_t columns,
                            int64_t num_classes, int64_t num_keys, const void* added, bool per_key,
                            void* reduced, void* gradient) {
    return driver::guarded(seed, [&] {
        const op::Reduced r{errseg::Number(type), num_rows, int(columns), int(num_classes),
                            int(num_keys),        added,    per_key,      *eps};
        return op::normalize_rows(r, reduced, gradient, nullptr);
    });
}

// Keys of a stage, stages of a head, bytes of shared memory.
extern "C" const char* plan(const int64_t* sizes, int64_t tiles, int64_t room, int64_t* result) {
    const float eps = 0.0f;
    const op::Problem problem =
        make(driver::kBFloat16, sizes, &eps, nullptr, nullptr, nullptr, nullptr, nullptr);
    return driver::guarded(0, [&] {
        return op::visit(problem, [&](auto how) {
            const op::Plan plan = op::Plan::make<decltype(how)>(problem, int(tiles), int(room));
            result[0] = plan.stage_keys, result[1] = plan.parts, result[2] = plan.bytes;
            return cudaSuccess;
        });
    });
}
