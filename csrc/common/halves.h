#pragma once
// 16-bit floating types to float32 and back, without branches and table look-ups, so that loops vectorise;
// rounded to the nearest, ties to even, as PyTorch does.
#include <cstring>

#include "common/simd.h"
#include "common/stable.h"

namespace errseg {

ERRSEG_INLINE float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
ERRSEG_INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

ERRSEG_INLINE float widen(float v) {
    return v;
}
ERRSEG_INLINE double widen(double v) {
    return v;
}
ERRSEG_INLINE float widen(BFloat16 v) {
    return float_of_bits(static_cast<uint32_t>(v.x) << 16);
}
ERRSEG_INLINE float widen(Half v) {
    const uint32_t bits = v.x, sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7FFFu) << 13;
    const float finite = float_of_bits(magnitude + (112u << 23));  // the exponent's other offset
    // A denormal number is what its bits add to 2^-14.
    const float small = float_of_bits(magnitude + (113u << 23)) - 0x1p-14f;
    const uint32_t value = bits_of_float((bits & 0x7C00u) == 0 ? small : finite);
    return float_of_bits(sign | ((bits & 0x7C00u) == 0x7C00u ? magnitude | 0x7F800000u : value));
}

template <typename T, typename S>
ERRSEG_INLINE T narrow(S v) {
    static_assert(std::is_same_v<T, S>);
    return v;
}
template <>
ERRSEG_INLINE BFloat16 narrow<BFloat16, float>(float v) {
    const uint32_t bits = bits_of_float(v), rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    return BFloat16(static_cast<uint16_t>(v != v ? 0x7FC0u : rounded), BFloat16::from_bits());
}
template <>
ERRSEG_INLINE Half narrow<Half, float>(float v) {
    const uint32_t bits = bits_of_float(v), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    const uint32_t normal = ((magnitude + 0xFFFu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
    // Adding 1/2 rounds a small number to a multiple of 2^-24.
    const uint32_t small = bits_of_float(float_of_bits(magnitude) + .5f) - bits_of_float(.5f);
    uint32_t rounded = magnitude < 0x38800000u ? small : normal;  // 2^-14
    rounded = magnitude >= 0x477FF000u ? 0x7C00u : rounded;       // 65520
    rounded = magnitude > 0x7F800000u ? 0x7E00u : rounded;
    return Half(static_cast<uint16_t>(sign | rounded), Half::from_bits());
}

}  // namespace errseg
