// Attention among any number of classes, with a running softmax over tiles of them. Products with the weights
// are made elsewhere: rows [pixels, K, 3, C] of key, value and query. A block takes one head of 64 classes of a
// pixel, its warps 16 each; what the others hold comes in stages of as many.
#pragma once

#include "class_attention/class_attention.cuh"

namespace errseg::class_attention {

constexpr int kStreamThreads = 128, kStreamRows = kStreamThreads / kWarpSize * kRows, kStreamStep = 32;

struct Attention {
    errseg::Number type;
    int pixels, num_classes, channels, heads;
    const void* rows;          // [pixels, num_classes, 3, channels]
    void* mixture;             // [pixels, num_classes, channels], which backward reads
    float* log_sums;           // [pixels, heads, num_classes], base 2, the same
    const void* mixture_grad;  // [pixels, num_classes, channels]
    Statistics* statistics;    // [pixels, heads, num_classes]
    void* rows_grad;           // as rows

    __host__ __device__ int head_width() const { return channels / heads; }
    __host__ __device__ float plain_scale() const { return 1.0f / std::sqrt(float(head_width())); }
};

// A block's pixel, head and classes, and its memory: two stages of two arrays.
template <typename T, int kHead>
struct Share {
    static constexpr int kPitch = kHead + kPadding, kArray = kStreamRows * kPitch;
    static constexpr int kBytes = 2 * kArray * int(sizeof(T));  // of a stage
    const Attention& a;
    int head, first, own, tiles;  // classes: of the block, of the warp within
    int64_t pixel;

    __device__ explicit Share(const Attention& attention) : a(attention) {
        tiles = ceil_div(a.num_classes, kStreamRows);
        pixel = blockIdx.x / tiles, head = blockIdx.y, first = blockIdx.x % tiles * kStreamRows;
        own = threadIdx.x / kWarpSize * kRows;
    }
    // Of class 0 and the block's head, in [pixels, K, per_class].
    template <typename Number>
    __device__ __forceinline__ Number* of_head(Number* from, int per_class) const {
        return from + pixel * a.num_classes * per_class + head * a.head_width();
    }
    __device__ __forceinline__ int64_t of_statistics() const {
        return (pixel * a.heads + head) * a.num_classes;
    }
    __device__ __forceinline__ const T* rows(int which) const {
        return of_head(static_cast<const T*>(a.rows), 3 * a.channels) + which * a.channels;
    }
    __device__ __forceinline__ T* rows_grad(int which) const {
        return of_head(static_cast<T*>(a.rows_grad), 3 * a.channels) + which * a.channels;
    }
    __device__ __forceinline__ const T* mixture_grad() const {
        return of_head(static_cast<const T*>(a.mixture_grad), a.channels);
    }
    // Classes from `start` on; zeros beyond the last.
    __device__ __forceinline__ void fetch(T* to, const T* from, int stride, int start) const {
        fetch_rows<kHead / 8>(to, kPitch, kStreamRows, kHead, from + int64_t(start) * stride, stride,
                              a.num_classes - start, a.head_width());
    }
    __device__ __forceinline__ void fetch_queries(char* stage, int start) const {
        T* to = reinterpret_cast<T*>(stage);
        fetch(to, rows(kQuery), 3 * a.channels, start);
        if (a.mixture_grad) fetch(to + kArray, mixture_grad(), a.channels, start);
    }
    __device__ __forceinline__ void fetch_keys(char* stage, int start) const {
        T* to = reinterpret_cast<T*>(stage);
        fetch(to, rows(kKey), 3 * a.channels, start), fetch(to + kArray, rows(kValue), 3 * a.channels, start);
    }
    // The class of a lane's sums, or -1.
    __device__ __forceinline__ int label(int half) const {
        const int at = first + own + sum_row(half);
        return at < a.num_classes ? at : -1;
    }
    __device__ __forceinline__ void store(T* to, int stride, const float (&sums)[kHead / 8][4],
                                          float factor) const {
        for_pairs<T>(sums, a.head_width(), [&](int half, int column, Pair<T> pair) {
            if (label(half) >= 0)
                Pair<T>{factor * pair.low, factor * pair.high}.store(to + int64_t(label(half)) * stride +
                                                                     column);
        });
    }
};

// Grid: tiles of classes of all pixels, heads.
template <typename T, int kHead>
__global__ void __launch_bounds__(kStreamThreads, 3) class_attention_stream_fwd_kernel(Attention a) {
    using S = Share<T, kHead>;
    const S share(a);
    const auto fetch = [&](int i, char* stage) {
        i ? share.fetch_keys(stage, (i - 1) * kStreamRows) : share.fetch_queries(stage, share.first);
    };
    Stream stages(dynamic_shared(), S::kBytes, 1 + share.tiles, fetch);
    Head<kHead> query;
    query.load(stages.template next<T>() + share.own * S::kPitch);
    const float scale = kLog2e * a.plain_scale();
    Mixture<T, kHead> mixture;
    for (int start = 0; start < a.num_classes; start += kStreamRows) {
        const T* key = stages.template next<T>();
        const int end = min(kStreamRows, a.num_classes - start);
        for (int k = 0; k < end; k += kStreamStep, key += kStreamStep * S::kPitch)
            mixture.template add<kStreamStep>(query, key, key + S::kArray, scale,
                                              [&](int, int column) { return k + column < end; });
    }
    mixture.finish();
    share.store(share.of_head(static_cast<T*>(a.mixture), a.channels), a.channels, mixture.mixed, 1.0f);
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (share.label(half) >= 0 && threadIdx.x % 4 == 0)
            a.log_sums[share.of_statistics() + share.label(half)] = mixture.log_sum(half);
}

template <typename T, int kHead>
__global__ void __launch_bounds__(kStreamThreads, kHead <= 32 ? 3 : 2)
    class_attention_stream_bwd_queries_kernel(Attention a) {
    using S = Share<T, kHead>;
    const S share(a);
    const auto fetch = [&](int i, char* stage) {
        i ? share.fetch_keys(stage, (i - 1) * kStreamRows) : share.fetch_queries(stage, share.first);
    };
    Stream stages(dynamic_shared(), S::kBytes, 1 + share.tiles, fetch);
    const T* own = stages.template next<T>() + share.own * S::kPitch;
    Head<kHead> query, mixture_grad;
    query.load(own), mixture_grad.load(own + S::kArray);
    Statistics statistics[2] = {};
    const T* mixture = share.of_head(static_cast<const T*>(a.mixture), a.channels);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int label = share.label(half);
#pragma unroll
        for (int n = 0; n < kHead / 8; ++n)
            if (label >= 0 && n * 8 < a.head_width()) {
                const auto mixed = Pair<T>::load(mixture + int64_t(label) * a.channels + sum_column(n));
                const auto grad = Pair<T>::load(own + S::kArray + sum_row(half) * S::kPitch + sum_column(n));
                statistics[half].delta += mixed.low * grad.low + mixed.high * grad.high;
            }
        statistics[half].delta = quad_sum(statistics[half].delta);
        if (label < 0) continue;
        statistics[half].log_sum = a.log_sums[share.of_statistics() + label];
        if (threadIdx.x % 4 == 0) a.statistics[share.of_statistics() + label] = statistics[half];
    }
    float query_grad[kHead / 8][4] = {};
    for (int start = 0; start < a.num_classes; start += kStreamRows) {
        const T* key = stages.template next<T>();
        const int end = min(kStreamRows, a.num_classes - start);
        for (int k = 0; k < end; k += kStreamStep, key += kStreamStep * S::kPitch)
            add_query_grad<T, kHead, kStreamStep>(query_grad, query, mixture_grad, key, key + S::kArray,
                                                  kLog2e * a.plain_scale(), statistics,
                                                  [&](int, int column) { return k + column < end; });
    }
    share.store(share.rows_grad(kQuery), 3 * a.channels, query_grad, a.plain_scale());
}

template <typename T, int kHead>
__global__ void __launch_bounds__(kStreamThreads, kHead <= 32 ? 3 : 2)
    class_attention_stream_bwd_keys_kernel(Attention a) {
    using S = Share<T, kHead>;
    const S share(a);
    const auto fetch = [&](int i, char* stage) {
        i ? share.fetch_queries(stage, (i - 1) * kStreamRows) : share.fetch_keys(stage, share.first);
    };
    Stream stages(dynamic_shared(), S::kBytes, 1 + share.tiles, fetch);
    const T* own = stages.template next<T>() + share.own * S::kPitch;
    Head<kHead> key, value;
    key.load(own), value.load(own + S::kArray);
    float key_grad[kHead / 8][4] = {}, value_grad[kHead / 8][4] = {};
    const Statistics* statistics = a.statistics + share.of_statistics();
    for (int start = 0; start < a.num_classes; start += kStreamRows) {
        const T* query = stages.template next<T>();
        const int end = min(kStreamRows, a.num_classes - start);
        for (int q = 0; q < end; q += kStreamStep, query += kStreamStep * S::kPitch)
            add_key_grads<T, kHead, kStreamStep>(
                key_grad, value_grad, key, value, query, query + S::kArray, kLog2e * a.plain_scale(),
                [&](int column) { return q + column < end ? statistics[start + q + column] : Statistics{}; },
                [&](int, int column) { return q + column < end; });
    }
    share.store(share.rows_grad(kKey), 3 * a.channels, key_grad, a.plain_scale());
    share.store(share.rows_grad(kValue), 3 * a.channels, value_grad, 1.0f);
}

// Calls `body(number, std::integral_constant<int, kHead>{})`.
template <typename Body>
cudaError_t visit_head(const Attention& a, const Body& body) {
    return visit_type(a.type, [&](auto number) {
        if (a.head_width() <= 32) return body(number, std::integral_constant<int, 32>{});
        return body(number, std::integral_constant<int, 64>{});
    });
}

template <typename S, typename Kernel>
cudaError_t launch_tiles(Kernel kernel, const Attention& a, cudaStream_t stream) {
    const dim3 grid(a.pixels * ceil_div(a.num_classes, kStreamRows), a.heads);
    return launch(kernel, grid, kStreamThreads, 2 * S::kBytes, stream, a);
}

// Mixture and log sums; needs at least one pixel.
inline cudaError_t stream_forward(const Attention& a, cudaStream_t stream) {
    return visit_head(a, [&](auto number, auto head) {
        using T = decltype(number);
        return launch_tiles<Share<T, head>>(class_attention_stream_fwd_kernel<T, head>, a, stream);
    });
}

// Gradients of the rows, by way of the statistics.
inline cudaError_t stream_backward(const Attention& a, cudaStream_t stream) {
    return visit_head(a, [&](auto number, auto head) {
        using T = decltype(number);
        const cudaError_t error =
            launch_tiles<Share<T, head>>(class_attention_stream_bwd_queries_kernel<T, head>, a, stream);
        if (error != cudaSuccess) return error;
        return launch_tiles<Share<T, head>>(class_attention_stream_bwd_keys_kernel<T, head>, a, stream);
    });
}

}  // namespace errseg::class_attention
