// One head's attention for the 16 rows of a warp, forward and backward, some keys or queries at a time. Scores
// are kept to base 2. What a row sees is asked for: sees(half, column), one of this step's columns.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/tiles.cuh"

namespace errseg {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kMaxChannels = 256, kMaxHeadWidth = 64;

// Why kernels cannot take these sizes; null when they can.
inline const char* unsupported(int channels, int heads) {
    if (channels % 16 || channels > kMaxChannels) return "channels in multiples of 16, up to 256";
    if (heads <= 0 || channels % heads || channels / heads % 8 || channels / heads > kMaxHeadWidth)
        return "heads of 8 to 64 channels in multiples of 8";
    return nullptr;
}

// What a row sees.
struct Everything {
    __device__ __forceinline__ bool operator()(int, int) const { return true; }
};
struct Leading {
    int count;
    __device__ __forceinline__ bool operator()(int, int column) const { return column < count; }
};
// Whether it is all of some columns, where that is soon told.
template <typename Sees>
__device__ __forceinline__ bool sees_all(const Sees&, int) {
    return false;
}
__device__ __forceinline__ bool sees_all(const Leading& leading, int columns) {
    return leading.count >= columns;
}

// A warp's rows of one head.
template <int kHead>
struct Head {
    uint32_t parts[kHead / 16][4];

    // Zeros from the first 16 columns on that are beyond the width.
    template <typename T>
    __device__ __forceinline__ void load(const T* from, int pitch = kHead + kPadding, int width = kHead) {
#pragma unroll
        for (int k = 0; k < kHead / 16; ++k) {
            if (k * 16 < width) {
                load_left(parts[k], from + k * 16, pitch);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) parts[k][i] = 0;
            }
        }
    }
    template <typename T>
    __device__ __forceinline__ void round(const float (&sums)[kHead / 8][4]) {
#pragma unroll
        for (int k = 0; k < kHead / 16; ++k) round_left<T>(parts[k], sums[2 * k], sums[2 * k + 1]);
    }
    // sums = own other^T for rows that lie one after the other.
    template <typename T, int kTiles>
    __device__ __forceinline__ void multiply(float (&sums)[kTiles][4], const T* other) const {
        clear(sums);
#pragma unroll
        for (int k = 0; k < kHead / 16; ++k)
            errseg::multiply<T, kTiles, false>(sums, parts[k], other + k * 16, kHead + kPadding);
    }
};

// sums += left rows, where the left factor is in the registers of its own sums, which T rounds.
template <typename T, int kHead, int kTiles>
__device__ __forceinline__ void mix(float (&sums)[kHead / 8][4], const float (&left)[kTiles][4],
                                    const T* rows) {
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
        uint32_t a[4];
        round_left<T>(a, left[n], left[n + 1]);
        multiply<T, kHead / 8, true>(sums, a, rows + n * 8 * (kHead + kPadding), kHead + kPadding);
    }
}

// What one head mixes for the warp's queries.
template <typename T, int kHead>
struct Mixture {
    float mixed[kHead / 8][4] = {};
    float highest[2] = {-FLT_MAX, -FLT_MAX}, total[2] = {};  // a lane's own part of the total

    // Takes in `kStep` keys; `scale` brings scores to base 2.
    template <int kStep, typename Sees>
    __device__ __forceinline__ void add(const Head<kHead>& query, const T* key, const T* value, float scale,
                                        const Sees& sees) {
        constexpr int kTiles = kStep / 8;
        float scores[kTiles][4];
        query.template multiply<T, kTiles>(scores, key);
        if (!sees_all(sees, kStep)) {
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (!sees(i / 2, sum_column(n) + i % 2)) scores[n][i] = -INFINITY;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = -FLT_MAX;  // finite, since a row may see none of these keys
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) top = fmaxf(top, scores[n][i] *= scale);
            top = fmaxf(highest[half], quad_max(top));
            const float shrink = exp2_of(highest[half] - top);
            highest[half] = top, total[half] *= shrink;
#pragma unroll
            for (int n = 0; n < kHead / 8; ++n)
                mixed[n][2 * half] *= shrink, mixed[n][2 * half + 1] *= shrink;
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    scores[n][i] = exp2_of(scores[n][i] - top);
                    total[half] += scores[n][i];
                }
        }
        mix<T, kHead>(mixed, scores, value);
    }

    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            total[half] = quad_sum(total[half]);
            const float share = 1.0f / total[half];
#pragma unroll
            for (int n = 0; n < kHead / 8; ++n) mixed[n][2 * half] *= share, mixed[n][2 * half + 1] *= share;
        }
    }
    __device__ __forceinline__ float log_sum(int half) const {
        return highest[half] + std::log2(total[half]);
    }
};

// What backward needs of a row: the scores' log sum, base 2, and the mixture times its gradient.
struct Statistics {
    float log_sum, delta;
};

// The gradient of the warp's queries, before the scores' scale.
template <typename T, int kHead, int kStep, typename Sees>
__device__ __forceinline__ void add_query_grad(float (&query_grad)[kHead / 8][4], const Head<kHead>& query,
                                               const Head<kHead>& mixture_grad, const T* key, const T* value,
                                               float scale, const Statistics (&own)[2], const Sees& sees) {
    constexpr int kTiles = kStep / 8;
    float scores[kTiles][4], score_grads[kTiles][4];
    query.template multiply<T, kTiles>(scores, key);
    mixture_grad.template multiply<T, kTiles>(score_grads, value);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Statistics& s = own[i / 2];
            const float share = exp2_of(scores[n][i] * scale - s.log_sum);
            const bool seen = sees(i / 2, sum_column(n) + i % 2);
            score_grads[n][i] = (seen ? share : 0.0f) * (score_grads[n][i] - s.delta);
        }
    mix<T, kHead>(query_grad, score_grads, key);
}

// The gradients of the warp's keys, before the scores' scale, and values; statistics(column) of the queries.
template <typename T, int kHead, int kStep, typename Sees, typename Of>
__device__ __forceinline__ void add_key_grads(float (&key_grad)[kHead / 8][4],
                                              float (&value_grad)[kHead / 8][4], const Head<kHead>& key,
                                              const Head<kHead>& value, const T* query, const T* mixture_grad,
                                              float scale, const Of& statistics, const Sees& sees) {
    constexpr int kTiles = kStep / 8;
    float shares[kTiles][4], score_grads[kTiles][4];
    key.template multiply<T, kTiles>(shares, query);
    value.template multiply<T, kTiles>(score_grads, mixture_grad);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Statistics s = statistics(sum_column(n) + i);
#pragma unroll
            for (int j = i; j < 4; j += 2) {
                const float share = exp2_of(shares[n][j] * scale - s.log_sum);
                const bool seen = sees(j / 2, sum_column(n) + i);
                shares[n][j] = seen ? share : 0.0f;
                score_grads[n][j] = shares[n][j] * (score_grads[n][j] - s.delta);
            }
        }
    __syncwarp();  // statistics may have been looked up by some lanes alone
    mix<T, kHead>(value_grad, shares, mixture_grad);
    mix<T, kHead>(key_grad, score_grads, query);
}

// Columns of a warp's sums as pairs: body(half, column, pair), `width` columns of each row.
template <typename T, int kTiles, typename Body>
__device__ __forceinline__ void for_pairs(const float (&sums)[kTiles][4], int width, const Body& body) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
            if (n * 8 < width) body(half, sum_column(n), Pair<T>{sums[n][2 * half], sums[n][2 * half + 1]});
}

}  // namespace errseg
