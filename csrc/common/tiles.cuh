// Rows of 16-bit numbers on their way through tensor cores: a warp's own rows, stages of weights that a block
// shares, products of tiles.
#pragma once

#include <cmath>

#include "common/async.cuh"
#include "common/device.cuh"
#include "common/mma.cuh"
#include "common/split.cuh"

namespace errseg {

constexpr int kRows = 16;    // of a warp
constexpr int kPadding = 8;  // columns between rows in shared memory, which spare ldmatrix bank conflicts

// ---- numbers

// Calls `body(T{})`.
template <typename Body>
cudaError_t visit_type(Number type, const Body& body) {
#ifndef DRIVER_FEW_TYPES
    if (type == Number::kFloat16) return body(half{});
#endif
    return type == Number::kBFloat16 ? body(bf16{}) : cudaErrorInvalidValue;
}

__device__ __forceinline__ float exp2_of(float v) {
#ifdef ERRSEG_EMULATED
    return std::exp2(v);
#else
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
#endif
}

// Two numbers rounded to T, `low` below.
template <typename T>
__device__ __forceinline__ uint32_t packed(float low, float high) {
#ifdef ERRSEG_EMULATED
    return pack(narrow<T>(low), narrow<T>(high));
#else
    uint32_t result;
    if constexpr (std::is_same_v<T, bf16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    }
    return result;
#endif
}

template <typename T>
struct Pair {
    float low, high;

    __device__ __forceinline__ static Pair load(const T* from) {
        const auto two = *reinterpret_cast<const Neighbours<T, 2>*>(from);
        return {widen(two.values[0]), widen(two.values[1])};
    }
    __device__ __forceinline__ void store(T* to) const {
        *reinterpret_cast<uint32_t*>(to) = packed<T>(low, high);
    }
};

// A row of an even number of columns, shared by the lanes of a warp.
template <typename T, int kPairs>
struct Row {
    Pair<T> pairs[kPairs];

    __device__ __forceinline__ static int column(int i) {
        return 2 * (i * kWarpSize + threadIdx.x % kWarpSize);
    }

    // Zeros beyond the last column.
    __device__ __forceinline__ void load(const T* from, int columns) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
            pairs[i] = column(i) < columns ? Pair<T>::load(from + column(i)) : Pair<T>{0.0f, 0.0f};
    }
    __device__ __forceinline__ void store(T* to, int columns) const {
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
            if (column(i) < columns) pairs[i].store(to + column(i));
    }
    // Changes the numbers of every pair of columns: body(i, pair).
    template <typename Body>
    __device__ __forceinline__ void change(int columns, const Body& body) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
            if (column(i) < columns) body(i, pairs[i]);
    }
    __device__ __forceinline__ void add(const Row& other) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
            pairs[i].low += other.pairs[i].low, pairs[i].high += other.pairs[i].high;
    }
    __device__ __forceinline__ float sum() const {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) total += pairs[i].low + pairs[i].high;
        return warp_sum(total);
    }
    __device__ __forceinline__ float dot(const Row& other) const {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
            total += pairs[i].low * other.pairs[i].low + pairs[i].high * other.pairs[i].high;
        return warp_sum(total);
    }
    __device__ __forceinline__ void scale(float factor) {
        change(kPairs * 2 * kWarpSize, [&](int, Pair<T>& v) { v.low *= factor, v.high *= factor; });
    }
    // LayerNorm without its affine part; gives one over the deviation.
    __device__ __forceinline__ float normalize(int columns, float eps) {
        const float mean = sum() / columns;
        change(columns, [&](int, Pair<T>& v) { v.low -= mean, v.high -= mean; });
        const float inverse = 1.0f / std::sqrt(dot(*this) / columns + eps);
        scale(inverse);
        return inverse;
    }
};

// ---- a warp's rows in shared memory

// Eight columns of each row to a thread, `kLanes` to a row: body(row, column).
template <int kLanes, typename Body>
__device__ __forceinline__ void for_eights(const Body& body) {
    const int lane = threadIdx.x % kWarpSize;
    __syncwarp();
#pragma unroll 2  // registers are short
    for (int row = 0; row < kRows; row += kWarpSize / kLanes) body(row + lane / kLanes, lane % kLanes * 8);
    __syncwarp();
}

// Rows of a tile from places `stride` numbers apart, zeros where place_of(row) is negative.
template <int kLanes, typename T, typename Place>
__device__ __forceinline__ void gather_rows(T* tile, int pitch, int columns, const T* from, int stride,
                                            const Place& place_of) {
    for_eights<kLanes>([&](int row, int column) {
        const auto at = place_of(row);
        if (column < columns)
            *reinterpret_cast<uint4*>(tile + row * pitch + column) =
                at < 0 ? uint4{} : *reinterpret_cast<const uint4*>(from + at * stride + column);
    });
}

// The way back, of rows whose place is not negative.
template <int kLanes, typename T, typename Place>
__device__ __forceinline__ void scatter_rows(const T* tile, int pitch, int columns, T* to, int stride,
                                             const Place& place_of) {
    for_eights<kLanes>([&](int row, int column) {
        const auto at = place_of(row);
        if (column < columns && at >= 0)
            *reinterpret_cast<uint4*>(to + at * stride + column) =
                *reinterpret_cast<const uint4*>(tile + row * pitch + column);
    });
}

// ---- stages

// What passes through two buffers: while one is used, `fetch(i, buffer)` fills the other asynchronously.
template <typename Fetch>
class Stream {
  public:
    __device__ __forceinline__ Stream(char* memory, int bytes, int count, const Fetch& fetch)
        : memory_(memory), bytes_(bytes), count_(count), fetch_(fetch) {
        fetch_(0, memory_);
        commit_async();
    }

    // The next stage, which the whole block asks for; nobody uses the one before any more.
    template <typename T>
    __device__ __forceinline__ const T* next() {
        wait_async<0>();
        __syncthreads();
        const char* stage = memory_ + index_ % 2 * bytes_;
        if (++index_ < count_) {
            fetch_(index_, memory_ + index_ % 2 * bytes_);
            commit_async();
        }
        return reinterpret_cast<const T*>(stage);
    }

  private:
    char* memory_;
    int bytes_, count_, index_ = 0;
    const Fetch& fetch_;
};

// Copies some rows of up to 8 kPieces columns, `columns` of which are wanted; zeros beyond the known rows and
// columns.
template <int kPieces, typename T>
__device__ __forceinline__ void fetch_rows(T* to, int pitch, int rows, int columns, const T* from, int stride,
                                           int known_rows, int known_columns) {
#pragma unroll 1  // registers are short
    for (int i = threadIdx.x; i < rows * kPieces; i += blockDim.x) {
        const int row = i / kPieces, column = i % kPieces * 8;
        const bool inside = row < known_rows && column < known_columns;
        if (column < columns)
            copy_async(to + row * pitch + column, from + (inside ? row * stride + column : 0), inside);
    }
}

// ---- products

// 16 rows and columns of the left factor, which lies by rows.
template <typename T>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* from, int pitch) {
    const int lane = threadIdx.x % kWarpSize;
    ldmatrix<4>(a, from + lane % 16 * pitch + lane / 16 * 8);
}

// The same from the sums of two neighbouring tiles, which T rounds.
template <typename T>
__device__ __forceinline__ void round_left(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
    a[0] = packed<T>(low[0], low[1]), a[1] = packed<T>(low[2], low[3]);
    a[2] = packed<T>(high[0], high[1]), a[3] = packed<T>(high[2], high[3]);
}

// sums += left right for 16 of the inner index and up to 8 kTiles columns, of which there are `columns`, rounded
// up to 16. The right factor lies by columns, or transposed.
template <typename T, int kTiles, bool kTransposed>
__device__ __forceinline__ void multiply(float (&sums)[kTiles][4], const uint32_t (&left)[4], const T* right,
                                         int pitch, int columns = 8 * kTiles) {
    static_assert(kTiles % 2 == 0);
    const int lane = threadIdx.x % kWarpSize, row = lane % 8, odd = lane / 8 % 2 * 8, high = lane / 16 * 8;
    const T* from = right + (kTransposed ? (row + odd) * pitch + high : (row + high) * pitch + odd);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
        if (n * 8 >= columns) continue;
        uint32_t b[4];
        ldmatrix<4, kTransposed>(b, from + (kTransposed ? n * 8 : n * 8 * pitch));
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        mma_m16n8k16<T>(sums[n], left, first);
        mma_m16n8k16<T>(sums[n + 1], left, second);
    }
}

template <int kTiles>
__device__ __forceinline__ void clear(float (&sums)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
}

// Rows and columns of a warp's sums: half 0 or 1, and the first of two neighbours.
__device__ __forceinline__ int sum_row(int half) {
    return threadIdx.x % kWarpSize / 4 + half * 8;
}
__device__ __forceinline__ int sum_column(int tile) {
    return tile * 8 + threadIdx.x % 4 * 2;
}

// Over the lanes that share a row of sums.
__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, 1));
    return fmaxf(v, __shfl_xor_sync(kFullWarp, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
    return warp_sum<4>(v);
}

}  // namespace errseg
