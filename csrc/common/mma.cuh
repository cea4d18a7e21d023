// Tensor-core instructions of a warp (sm_80 and later): ldmatrix and mma.sync.m16n8k16 with float32 sums.
// In tests they are emulated with the same fragment layout.
//
// Fragments, with g = lane / 4 and q = 2 (lane % 4); each register holds two neighbours, the lower index
// below:
//   a (16 x 16, by rows):   a[0] = A[g, q..], a[1] = A[g + 8, q..], a[2] = A[g, q + 8..], a[3] = A[g + 8, q + 8..]
//   b (16 x 8, by columns): b[0] = B[q.., g], b[1] = B[q + 8.., g]
//   d (16 x 8):             d[0..1] = D[g, q..], d[2..3] = D[g + 8, q..]
#pragma once

#include <type_traits>

#include "common/device.cuh"

#ifdef ERRSEG_EMULATED
#define ERRSEG_CALLER_LINE , int line = __builtin_LINE()
#else
#define ERRSEG_CALLER_LINE
#endif

namespace errseg {

#ifndef ERRSEG_EMULATED
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// d += a b for T = bf16 or half.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2] ERRSEG_CALLER_LINE) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, half>);
#ifdef ERRSEG_EMULATED
    emulator::mma_m16n8k16<T>(d, a, b, line);
#else
    if constexpr (std::is_same_v<T, bf16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
}

// Loads `Count` (1, 2 or 4) 8 x 8 matrices of 16-bit numbers from shared memory, one register each. Lane 8 m
// + r gives the address of row r of matrix m, aligned to 16 bytes; the lane then holds M[lane / 4, 2 (lane %
// 4)..], or with `Transposed` the same place of the transposed matrix.
template <int Count, bool Transposed = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&registers)[Count], const void* row ERRSEG_CALLER_LINE) {
    static_assert(Count == 1 || Count == 2 || Count == 4);
#ifdef ERRSEG_EMULATED
    emulator::ldmatrix<Count, Transposed>(registers, row, line);
#else
    const uint32_t address = shared_address(row);
    if constexpr (Count == 1 && !Transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(registers[0])
                     : "r"(address)
                     : "memory");
    } else if constexpr (Count == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(registers[0])
                     : "r"(address)
                     : "memory");
    } else if constexpr (Count == 2 && !Transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(registers[0]), "=r"(registers[1])
                     : "r"(address)
                     : "memory");
    } else if constexpr (Count == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(registers[0]), "=r"(registers[1])
                     : "r"(address)
                     : "memory");
    } else if constexpr (!Transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                     : "r"(address)
                     : "memory");
    }
#endif
}

// Two numbers rounded to T in one register, `low` below.
template <typename T>
__device__ __forceinline__ uint32_t pack(T low, T high) {
    static_assert(sizeof(T) == 2);
#ifdef ERRSEG_EMULATED
    return uint32_t(low.bits) | uint32_t(high.bits) << 16;
#else
    if constexpr (std::is_same_v<T, bf16>) {
        return uint32_t(__bfloat16_as_ushort(low)) | uint32_t(__bfloat16_as_ushort(high)) << 16;
    } else {
        return uint32_t(__half_as_ushort(low)) | uint32_t(__half_as_ushort(high)) << 16;
    }
#endif
}

}  // namespace errseg
