#pragma once
// One object file with several instruction sets: AVX-512, AVX2 and the baseline, chosen when the library is
// loaded.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#define ERRSEG_INLINE inline __attribute__((always_inline))

// gcc alone clones templates; sanitizers start after the resolvers that pick a clone would run.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11 && \
    !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && !defined(ERRSEG_NO_CLONES)
#define ERRSEG_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ERRSEG_CLONES
#endif

// Products and sums of a function are rounded one by one, in all of its loops and instruction sets alike:
// equal inputs give equal results wherever they stand. clang wants it inside the body.
#if defined(__clang__)
#define ERRSEG_NO_CONTRACTION
#define ERRSEG_NO_CONTRACTION_HERE _Pragma("clang fp contract(off)")
#else
#define ERRSEG_NO_CONTRACTION __attribute__((optimize("fp-contract=off")))
#define ERRSEG_NO_CONTRACTION_HERE
#endif

namespace errseg {

/// exp(x - n log 2) for the integer n nearest to x / log 2, of a number or of a vector of them.
template <typename V>
ERRSEG_INLINE V exp_remainder(V x, V n) {
    V r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.f;
}

/// exp(x) for x <= 0 to 2 units in the last place, denormals included, in a form that loops vectorise; NaN
/// stays NaN.
ERRSEG_INLINE float exp_nonpositive(float x) {
    x = x < -104.f ? -104.f : x;
    const float shifted =
        x * 1.442695041f + 12582912.f;  // 1.5 * 2^23 leaves the nearest integer in the low bits
    const float p = exp_remainder(x, shifted - 12582912.f);
    int32_t exponent;
    std::memcpy(&exponent, &shifted, 4);
    exponent -= 0x4B400000;
    // 2^n in two factors, since n may lie below the exponents of normal numbers.
    const int32_t half = exponent >> 1;
    const uint32_t first = static_cast<uint32_t>(half + 127) << 23;
    const uint32_t second = static_cast<uint32_t>(exponent - half + 127) << 23;
    float a, b;
    std::memcpy(&a, &first, 4);
    std::memcpy(&b, &second, 4);
    return p * a * b;
}

/// S[kBytes / sizeof(S)], computed with element by element.
template <typename S, int kBytes>
struct Vector {
    typedef S Type __attribute__((vector_size(kBytes), may_alias));
    static constexpr int kLanes = kBytes / static_cast<int>(sizeof(S));
};

// ---- Row::run in three instruction sets, for kernels that say how wide their vectors are

template <typename Row, typename... Arguments>
void baseline(Arguments... arguments) {
    Row::run(arguments...);
}

#if defined(__x86_64__) && defined(__GNUC__)
template <typename Row, typename... Arguments>
__attribute__((target("avx2,fma"))) void avx2(Arguments... arguments) {
    Row::run(arguments...);
}

template <typename Row, typename... Arguments>
__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512"))) void avx512(
    Arguments... arguments) {
    Row::run(arguments...);
}
#endif

/// The widest vectors of this processor: 64, 32 or 16 bytes.
inline int widest_vectors() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        return 64;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 32;
#endif
    return 16;
}

/// Those to use: at most ERRSEG_VECTOR_BYTES, so that tests reach what older processors run.
inline int vector_bytes() {
    static const int bytes = [] {
        const char* most = std::getenv("ERRSEG_VECTOR_BYTES");
        const int widest = widest_vectors();
        return most && std::atoi(most) < widest ? (std::atoi(most) < 32 ? 16 : 32) : widest;
    }();
    return bytes;
}

inline int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/// Zeros that begin at a cache line.
template <typename S>
class Lines {
  public:
    explicit Lines(int64_t count) : lines_(divide_up(count, kValues)) {}
    S* data() { return lines_.empty() ? nullptr : lines_[0].values; }
    const S* data() const { return lines_.empty() ? nullptr : lines_[0].values; }

  private:
    static constexpr int64_t kValues = 64 / sizeof(S);
    struct alignas(64) Line {
        S values[kValues];
    };
    std::vector<Line> lines_;
};

}  // namespace errseg
