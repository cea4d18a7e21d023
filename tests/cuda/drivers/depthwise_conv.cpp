#include "depthwise_conv/depthwise_conv.cuh"

#include "driver.h"

namespace op = errseg::depthwise_conv;

namespace {

static_assert(int64_t(errseg::Number::kBFloat16) == driver::kBFloat16);

op::Numbers numbers(void* data, int64_t type) {
    return {data, errseg::Number(type)};
}

}  // namespace

extern "C" const char* convolve(int64_t seed, int64_t type, int64_t weight_type, const void* in, void* weight,
                                int64_t turned, void* bias, void* scales, const void* added, void* out,
                                int64_t maps, int64_t height, int64_t width, int64_t channels, int64_t size) {
    return driver::guarded(seed, [&] {
        return driver::visit(type, [&](auto number) {
            using T = decltype(number);
            const op::Convolution<T> p{{int(maps), int(height), int(width), int(channels)},
                                       int(size),
                                       static_cast<const T*>(in),
                                       numbers(weight, weight_type),
                                       turned != 0,
                                       numbers(bias, weight_type),
                                       numbers(scales, weight_type),
                                       static_cast<const T*>(added),
                                       static_cast<T*>(out)};
            return op::run(p, nullptr);
        });
    });
}

extern "C" const char* gather(int64_t seed, int64_t type, int64_t weight_type, const void* in,
                              const void* grad, void* scales, void* weight_grad, void* bias_grad,
                              int64_t maps, int64_t height, int64_t width, int64_t channels, int64_t size,
                              int64_t* walked) {
    return driver::guarded(seed, [&] {
        return driver::visit(type, [&](auto number) {
            using T = decltype(number);
            using S = errseg::accumulator_t<T>;
            op::Gathering<T> p{{int(maps), int(height), int(width), int(channels)},
                               int(size),
                               static_cast<const T*>(in),
                               static_cast<const T*>(grad),
                               numbers(scales, weight_type),
                               nullptr,
                               numbers(weight_grad, weight_type),
                               numbers(bias_grad, weight_type)};
            const size_t count = p.cut().units() * (size * size + 1) * channels;
            const std::unique_ptr<S[]> gathered(new S[count]);
            std::memset(static_cast<void*>(gathered.get()), 0xFF, count * sizeof(S));
            p.gathered = gathered.get();
            *walked = p.walks();
            return op::run(p, nullptr);
        });
    });
}

// Units that the plain kernel gathers in.
extern "C" const char* plain_units(int64_t maps, int64_t height, int64_t width, int64_t channels,
                                   int64_t* result) {
    *result = op::Cut::plain({int(maps), int(height), int(width), int(channels)}).units();
    return nullptr;
}
