// Bilinear resampling by PyTorch's rule (half-pixel centres, align_corners=False), forwards and backwards.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/device.cuh"

namespace errseg {

// Output `o` lies between the inputs `low` and `high` and takes the share `weight` of `high`.
template <typename S>
struct Tap {
    int low, high;
    S weight;

    __device__ __forceinline__ S mix(S at_low, S at_high) const {
        return (S(1) - weight) * at_low + weight * at_high;
    }
};

// One axis, `in` positions brought to `out`.
template <typename S>
struct BilinearAxis {
    int in, out;
    S scale;

    BilinearAxis(int in, int out) : in(in), out(out), scale(static_cast<S>(in) / static_cast<S>(out)) {}

    __host__ __device__ __forceinline__ S source(int o) const {
        // The fused operation by name: every use must round alike, or a position would have two values of
        // `low`.
        const S position = std::fma(scale, static_cast<S>(o) + S(0.5), S(-0.5));
        return position > S(0) ? position : S(0);
    }

    __host__ __device__ __forceinline__ int low(int o) const {
        const int position = static_cast<int>(source(o));
        return position < in - 1 ? position : in - 1;
    }

    __device__ __forceinline__ Tap<S> tap(int o) const {
        const int at = low(o);
        const S weight = source(o) - static_cast<S>(at);
        return {at, at < in - 1 ? at + 1 : at, weight < S(1) ? weight : S(1)};
    }

    // The first output with `low` >= `position`; `out` when there is none. `low` never decreases.
    __device__ int first_output(int position) const {
        if (position <= 0) return 0;
        if (position >= in) return out;
        S guess = std::ceil((static_cast<S>(position) + S(0.5)) / scale - S(0.5));
        int o = guess < static_cast<S>(out) ? static_cast<int>(guess) : out;
        while (o > 0 && low(o - 1) >= position) --o;
        while (o < out && low(o) < position) ++o;
        return o;
    }

    // No `outputs` neighbours need more inputs than this.
    int most_inputs(int outputs) const {
        const double span =
            std::min<double>(in, std::floor((outputs - 1) * static_cast<double>(scale)) + 3.0);
        return static_cast<int>(span);
    }
};

}  // namespace errseg
