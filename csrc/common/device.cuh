// What every kernel includes: element types, loads, warp sums, launches. Compiles under nvcc and, in tests,
// under a C++ compiler whose CUDA is emulated (tests/cuda/emulator.h, included beforehand).
#pragma once

#include <climits>
#include <cstdint>
#include <utility>

#ifndef ERRSEG_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace errseg {

using bf16 = __nv_bfloat16;
using half = __half;

// Arithmetic is float32, or float64 for float64 inputs.
template <typename T>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};
template <typename T>
using accumulator_t = typename Accumulator<T>::type;

__device__ __forceinline__ float widen(float v) {
    return v;
}
__device__ __forceinline__ double widen(double v) {
    return v;
}
__device__ __forceinline__ float widen(bf16 v) {
    return __bfloat162float(v);
}
__device__ __forceinline__ float widen(half v) {
    return __half2float(v);
}

template <typename T>
__device__ __forceinline__ T narrow(accumulator_t<T> v) {
    return v;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float v) {
    return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ half narrow<half>(float v) {
    return __float2half_rn(v);
}

constexpr unsigned kFullWarp = ~0u;
constexpr int kWarpSize = 32;

// Every lane gets the sum, which depends on the values alone: each step adds the same two halves on both
// sides.
template <int Width = kWarpSize, typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int bits = Width / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(kFullWarp, value, bits);
    return value;
}

// The dynamic shared memory of the block, aligned to 16 bytes.
__device__ __forceinline__ char* dynamic_shared() {
#ifdef ERRSEG_EMULATED
    return static_cast<char*>(emulator::machine().shared());
#else
    extern __shared__ __align__(16) char errseg_dynamic_shared[];
    return errseg_dynamic_shared;
#endif
}

template <typename Int>
constexpr __host__ __device__ Int ceil_div(Int a, Int b) {
    return (a + b - 1) / b;
}

// Shared memory above this needs the kernel's consent, which `launch` gives.
constexpr size_t kDefaultSharedBytes = 48 << 10;

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
#ifdef ERRSEG_EMULATED
    (void)stream;
    emulator::run(grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
    return cudaSuccess;
#else
    if (shared_bytes > kDefaultSharedBytes) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (error != cudaSuccess) {
            cudaGetLastError();  // takes it back: the next launch would report it
            return error;
        }
    }
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
    return cudaGetLastError();
#endif
}

}  // namespace errseg
