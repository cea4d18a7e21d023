// Small kernels that try the emulator itself; some of them are wrong on purpose.
#include "common/mma.cuh"
#include "driver.h"

using namespace errseg;

namespace {

// ---- tensor cores, register by register

template <typename T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
    const int lane = threadIdx.x;
    uint32_t left[4], right[2];
    float sums[4];
    for (int i = 0; i < 4; ++i) left[i] = a[lane * 4 + i], sums[i] = d[lane * 4 + i];
    for (int i = 0; i < 2; ++i) right[i] = b[lane * 2 + i];
    mma_m16n8k16<T>(sums, left, right);
    for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

template <int Count, bool Transposed>
__global__ void ldmatrix_kernel(const uint16_t* matrices, uint32_t* result) {
    auto* rows = reinterpret_cast<uint16_t*>(dynamic_shared());
    for (int i = threadIdx.x; i < Count * 64; i += kWarpSize) rows[i] = matrices[i];
    __syncwarp();
    uint32_t registers[Count];
    ldmatrix<Count, Transposed>(registers, rows + threadIdx.x % (8 * Count) * 8);
    for (int i = 0; i < Count; ++i) result[threadIdx.x * Count + i] = registers[i];
}

// A product of row-major A [16, 16] and B [16, 8] the way kernels do it: ldmatrix, then mma.
template <typename T>
__global__ void product_kernel(const T* a, const T* b, float* d) {
    T* left = reinterpret_cast<T*>(dynamic_shared());
    T* right = left + 16 * 16;
    const int lane = threadIdx.x, matrix = lane / 8, row = lane % 8;
    for (int i = lane; i < 16 * 16; i += kWarpSize) left[i] = a[i];
    for (int i = lane; i < 16 * 8; i += kWarpSize) right[i] = b[i];
    __syncwarp();
    uint32_t x[4], y[2];
    float sums[4] = {};
    ldmatrix<4>(x, left + (row + matrix % 2 * 8) * 16 + matrix / 2 * 8);
    ldmatrix<2, true>(y, right + (row + matrix % 2 * 8) * 8);
    mma_m16n8k16<T>(sums, x, y);
    for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

template <typename T>
__global__ void round_kernel(const float* from, T* to, float* back, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = narrow<T>(from[i]), back[i] = widen(to[i]);
}

// ---- warps and blocks

__global__ void warp_kernel(const int* values, int* result) {
    const int lane = threadIdx.x % kWarpSize, value = values[threadIdx.x];
    int* out = result + threadIdx.x * 9;
    out[0] = __shfl_sync(kFullWarp, value, 5);
    out[1] = __shfl_xor_sync(kFullWarp, value, 9);
    out[2] = __shfl_down_sync(kFullWarp, value, 3, 8);
    out[3] = __shfl_up_sync(kFullWarp, value, 3, 8);
    out[4] = int(__ballot_sync(kFullWarp, value % 2));
    out[5] = __reduce_add_sync(kFullWarp, value);
    out[6] = warp_sum(value);
    // Two halves of a warp meet separately.
    out[7] = lane < 16 ? __reduce_max_sync(0xFFFFu, value) : __reduce_min_sync(0xFFFF0000u, value);
    out[8] = __syncthreads_count(value % 3 == 0);
}

// Which of the block's rules a kernel breaks.
enum Bug : int64_t {
    kNone,
    kNoBarrier,
    kDivergentBarrier,
    kEarlyExit,
    kMixedCollectives,
    kMissingLane,
    kTooFar,
    kUnalignedRow,
    kUnwaitedCopy,
    kEarlyRead,
};

// Reverses 96 numbers through shared memory.
__global__ void reverse_kernel(const int* from, int* to, int64_t bug) {
    int* shared = reinterpret_cast<int*>(dynamic_shared());
    const int i = threadIdx.x, n = blockDim.x;
    if (bug == kEarlyExit && i == 40) return;
    shared[bug == kTooFar ? i + 1 : i] = from[i];
    if (bug == kDivergentBarrier && i % 2) {
        __syncthreads();
    } else if (bug != kNoBarrier) {
        __syncthreads();
    }
    if (bug == kMixedCollectives) {
        if (i % 32 < 7) {
            __syncwarp();
        } else {
            __shfl_sync(kFullWarp, i, 0);
        }
    }
    if (bug == kMissingLane && i % 32 != 31) __ballot_sync(kFullWarp, 1);
    if (bug == kUnalignedRow) {
        uint32_t registers[1];
        ldmatrix<1>(registers, shared + 1);
    }
    to[blockIdx.x * n + i] = shared[n - 1 - i];
}

// The same by asynchronous copies of four numbers.
__global__ void copy_kernel(const int* from, int* to, int64_t bug) {
    int* shared = reinterpret_cast<int*>(dynamic_shared());
    const int i = threadIdx.x, n = blockDim.x;
    if (i < n / 4) emulator::copy_async(shared + 4 * i, from + 4 * i, 16, 16);
    emulator::commit_async();
    if (bug != kUnwaitedCopy && bug != kEarlyRead) emulator::wait_async(0);
    __syncthreads();
    to[i] = shared[n - 1 - i];
    if (bug == kEarlyRead) emulator::wait_async(0);
}

__global__ void histogram_kernel(const int* values, int count, int* histogram) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        atomicAdd(&histogram[values[i]], 1);
}

}  // namespace

extern "C" {

const char* mma(int64_t seed, int64_t type, const uint32_t* a, const uint32_t* b, float* d) {
    const auto kernel = type == driver::kFloat16 ? mma_kernel<half> : mma_kernel<bf16>;
    return driver::guarded(seed, [&] { return launch(kernel, 1, 32, 0, nullptr, a, b, d); });
}

const char* load_matrices(int64_t seed, int64_t count, int64_t transposed, const uint16_t* matrices,
                          uint32_t* result) {
    const auto kernel = count == 1   ? (transposed ? ldmatrix_kernel<1, true> : ldmatrix_kernel<1, false>)
                        : count == 2 ? (transposed ? ldmatrix_kernel<2, true> : ldmatrix_kernel<2, false>)
                                     : (transposed ? ldmatrix_kernel<4, true> : ldmatrix_kernel<4, false>);
    return driver::guarded(seed,
                           [&] { return launch(kernel, 1, 32, count * 128, nullptr, matrices, result); });
}

const char* product(int64_t seed, const half* a, const half* b, float* d) {
    return driver::guarded(seed, [&] { return launch(product_kernel<half>, 1, 32, 768, nullptr, a, b, d); });
}

const char* round_to(int64_t type, const float* from, void* to, float* back, int64_t count) {
    return driver::guarded(0, [&] {
        if (type == driver::kFloat16)
            return launch(round_kernel<half>, 1, 64, 0, nullptr, from, static_cast<half*>(to), back,
                          int(count));
        return launch(round_kernel<bf16>, 1, 64, 0, nullptr, from, static_cast<bf16*>(to), back, int(count));
    });
}

const char* warps(int64_t seed, const int* values, int* result) {
    return driver::guarded(seed, [&] { return launch(warp_kernel, 1, 64, 0, nullptr, values, result); });
}

const char* reverse(int64_t seed, const int* from, int* to, int64_t bug) {
    return driver::guarded(seed,
                           [&] { return launch(reverse_kernel, 2, 96, 96 * 4, nullptr, from, to, bug); });
}

const char* copy(int64_t seed, const int* from, int* to, int64_t bug) {
    return driver::guarded(seed, [&] { return launch(copy_kernel, 1, 96, 96 * 4, nullptr, from, to, bug); });
}

const char* histogram(int64_t seed, const int* values, int64_t count, int* result) {
    return driver::guarded(seed, [&] {
        return launch(histogram_kernel, dim3(3, 1, 1), 64, 0, nullptr, values, int(count), result);
    });
}

const char* refused(int64_t blocks, int64_t threads, int64_t shared_bytes) {
    return driver::guarded(0, [&] {
        return launch(histogram_kernel, dim3(1, blocks), threads, shared_bytes, nullptr, nullptr, 0, nullptr);
    });
}
}
