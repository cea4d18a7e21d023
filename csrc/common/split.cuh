// Floating numbers of any type, brought to tensor cores: loaded as neighbours, and split into parts of 16
// bits. The products of 16-bit numbers are exact in float32. A float32 is the sum of three bfloat16 (8 + 8 + 8
// bits); of their products the six leading ones are summed, and what is left out is below 2^-26 of the whole.
#pragma once

#include <type_traits>

#include "common/device.cuh"
#include "common/mma.cuh"

namespace errseg {

enum class Number { kFloat32, kFloat64, kFloat16, kBFloat16 };

template <typename T>
constexpr Number number_of = std::is_same_v<T, double> ? Number::kFloat64
                             : std::is_same_v<T, half> ? Number::kFloat16
                             : std::is_same_v<T, bf16> ? Number::kBFloat16
                                                       : Number::kFloat32;

// Numbers of a type that is known when the kernel runs.
struct Numbers {
    const void* data;
    Number type;

    template <typename T>
    __device__ __forceinline__ const T* as() const {
        return static_cast<const T*>(data);
    }

    // Whether `count` neighbours can be loaded at once wherever a multiple of all `strides` leads.
    template <typename... Strides>
    bool aligned_to(int count, Strides... strides) const {
        const int bytes = type == Number::kFloat64 ? 8 : type == Number::kFloat32 ? 4 : 2;
        return ((strides % count == 0) && ...) && reinterpret_cast<uintptr_t>(data) % (count * bytes) == 0;
    }
};

// How numbers are multiplied: as one Part each, or as the sum of kCount parts.
template <typename T, int kCount>
struct Split {
    using Part = T;
    static constexpr int kParts = kCount;
    using Whole = std::conditional_t<kParts == 1, Part, float>;
};

// Calls `body(T{})`: with one part the tensor cores' own type, else any but float64.
template <typename How, typename Body>
__device__ __forceinline__ void visit_number(Number type, const Body& body) {
    if constexpr (How::kParts == 1) {
        body(typename How::Part{});
    } else {
        switch (type) {
            case Number::kFloat16:
                return body(half{});
            case Number::kBFloat16:
                return body(bf16{});
            default:
                return body(float{});
        }
    }
}

template <typename To, typename T>
__device__ __forceinline__ To convert(T value) {
    if constexpr (std::is_same_v<To, T>) {
        return value;
    } else {
        return narrow<To>(widen(value));
    }
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Neighbours {
    T values[kCount];
};

// The first `valid` of kCount neighbours, zero beyond; in one access where `aligned` allows it.
template <int kCount, typename To, typename T>
__device__ __forceinline__ void load_neighbours(To (&result)[kCount], const T* from, int valid,
                                                bool aligned) {
    if (aligned && valid >= kCount) {
        const auto values = *reinterpret_cast<const Neighbours<T, kCount>*>(from);
#pragma unroll
        for (int i = 0; i < kCount; ++i) result[i] = convert<To>(values.values[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) result[i] = i < valid ? convert<To>(from[i]) : narrow<To>(0.0f);
    }
}

// The leading part of some numbers, two to a register, which is taken from them: the parts add up to the
// number.
template <typename Part, int kCount>
__device__ __forceinline__ void take_part(uint32_t (&packed)[kCount / 2], float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
        const Part low = narrow<Part>(values[i]), high = narrow<Part>(values[i + 1]);
        packed[i / 2] = pack(low, high);
        values[i] -= widen(low), values[i + 1] -= widen(high);
    }
}

// Of numbers that are their only part.
template <typename Part, int kCount>
__device__ __forceinline__ void take_part(uint32_t (&packed)[kCount / 2], Part (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) packed[i / 2] = pack(values[i], values[i + 1]);
}

}  // namespace errseg
