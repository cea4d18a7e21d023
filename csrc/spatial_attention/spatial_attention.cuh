// Attention among the pixels of a map, with keys and values from windows of pixels, on tensor cores.
//
// Forward, one launch: a warp takes 16 pixels through the block's tile in shared memory. It normalises them,
// replaces them by the queries of all heads, those head by head by the mixture of values, and that by the
// result. Backward: a launch by queries makes queries and the mixture's gradient anew in the same way and
// leaves them, with the queries' gradients, for a launch by keys. So every number has one writer.
//
// What a block's warps share, weights and keys with values, passes through two buffers. They hold all keys of
// a head where there is room, else part after part. Scores are kept to base 2, with a running maximum.
//
// Queries are taken window by window: token t of a map is pixel t % w w of window t / w w, with windows
// counted over the whole map. An odd map ends in windows that stick out; their missing pixels are zeros.
// Keys belong to whole windows.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/heads.cuh"

namespace errseg::spatial_attention {

constexpr int kKeyStep = 32;  // keys, or queries of a launch by keys, at a time; stages hold multiples
constexpr float kLn2 = 0.6931471805599453f;

// What a kernel is compiled for: 16 kDepth channels at most, and heads that fit into kHead.
template <typename T, int kDepth_, int kHead_>
struct How {
    using Number = T;
    static constexpr int kDepth = kDepth_, kHead = kHead_, kHeadPitch = kHead + kPadding;
    static constexpr int kWarps = kDepth <= 8 ? 8 : 4, kThreads = kWarps * kWarpSize;
    static constexpr int kQueries = kWarps * kRows;
    static constexpr int kWeightRows = kDepth <= 8 ? 32 : 16;           // of a stage
    static constexpr int kBlocks = kHead <= 32 || kWarps == 4 ? 2 : 1;  // on a multiprocessor
};

struct Problem {
    errseg::Number type;
    const void* x;             // [maps, num_pixels, channels]
    const void* query_map;     // [maps / num_classes, num_pixels, channels]
    const void *key, *value;   // [maps, num_keys, channels]
    const void* query_weight;  // [channels, channels]
    int maps, num_classes, height, width, channels, heads, window;
    float eps;

    __host__ __device__ int num_pixels() const { return height * width; }
    __host__ __device__ int num_keys() const { return (height / window) * (width / window); }
    __host__ __device__ int across() const { return ceil_div(width, window); }
    __host__ __device__ int num_tokens() const {
        return ceil_div(height, window) * across() * window * window;
    }
    __host__ __device__ int head_width() const { return channels / heads; }
    __host__ __device__ int pitch() const { return channels + kPadding; }
};

struct Forward {
    const void *out_weight, *out_bias;  // [channels, channels], [channels]
    const void* drop_path;              // [maps], or null
    void* out;                          // [maps, num_pixels, channels]
    void* mixture;                      // the same; null, with log_sums, when nobody wants it
    float* log_sums;                    // [maps, heads, num_tokens], base 2
};

struct Backward {
    const void* grad;                   // [maps, num_pixels, channels], of the projected mixture
    const void* out_weight_transposed;  // [channels, channels]
    const void* mixture;                // [maps, num_pixels, channels]
    const float* log_sums;              // [maps, heads, num_tokens]
    void* z;                            // [maps, num_tokens, channels], normalised pixels
    void *query, *mixture_grad;         // the same; queries for scores to base 2
    void* query_grad;                   // the same
    float* deltas;                      // [maps, heads, num_tokens], mixture times its gradient
    void *key_grad, *value_grad;        // [maps, num_keys, channels]
};

// How shared memory is cut: tiles of queries, then two stages.
struct Plan {
    int stage_keys, parts;
    int stage_bytes, bytes;

    // Within `room` bytes where that holds the smallest stages.
    template <typename H>
    static Plan make(const Problem& p, int tiles, int room) {
        const int row_bytes = 2 * H::kHeadPitch * 2, tile_bytes = tiles * H::kQueries * p.pitch() * 2;
        const int weight_bytes = H::kWeightRows * p.pitch() * 2;
        const int fitting = (room - tile_bytes) / (2 * row_bytes) / kKeyStep * kKeyStep;
        const int half = ceil_div(ceil_div(p.num_keys(), 2), kKeyStep) * kKeyStep;
        Plan plan;
        plan.parts = ceil_div(p.num_keys(), std::max(std::min(fitting, half), kKeyStep));
        plan.stage_keys = ceil_div(ceil_div(p.num_keys(), plan.parts), kKeyStep) * kKeyStep;
        plan.stage_bytes = std::max(plan.stage_keys * row_bytes, weight_bytes);
        plan.bytes = tile_bytes + 2 * plan.stage_bytes;
        return plan;
    }
};

// ---- pixels and tokens

// Where token t of a map lies, or -1.
__device__ __forceinline__ int pixel_of(const Problem& p, int t) {
    const int area = p.window * p.window, window = t / area, within = t % area;
    const int row = window / p.across() * p.window + within / p.window;
    const int column = window % p.across() * p.window + within % p.window;
    return row < p.height && column < p.width ? row * p.width + column : -1;
}

// The rows of a warp in a tile of queries.
template <typename H>
struct Queries {
    using T = typename H::Number;
    static constexpr int kRowLanes = 2 * H::kDepth;  // threads that copy a row
    const Problem& p;
    int map, first;  // token
    int own_pixel;   // of row lane % 16, or -1

    __device__ explicit Queries(const Problem& problem) : p(problem) {
        const int tiles = ceil_div(p.num_tokens(), H::kQueries);
        map = blockIdx.x / tiles;
        first = (blockIdx.x - map * tiles) * H::kQueries + threadIdx.x / kWarpSize * kRows;
        const int t = first + threadIdx.x % kRows;
        own_pixel = t < p.num_tokens() ? pixel_of(p, t) : -1;
    }

    // Every lane of the warp asks.
    __device__ __forceinline__ int pixel(int row) const { return __shfl_sync(kFullWarp, own_pixel, row); }
    __device__ __forceinline__ int token(int row) const {
        return first + row < p.num_tokens() ? first + row : -1;
    }
    __device__ __forceinline__ int64_t pixels_of_map() const {
        return int64_t(map) * p.num_pixels() * p.channels;
    }
    __device__ __forceinline__ int64_t tokens_of_map() const {
        return int64_t(map) * p.num_tokens() * p.channels;
    }

    // The last head may reach into the padding, where its factor is zero.
    __device__ __forceinline__ void clear_padding(T* tile) const {
        const int lane = threadIdx.x % kWarpSize;
        if (lane < kRows) *reinterpret_cast<uint4*>(tile + lane * p.pitch() + p.channels) = {};
    }

    __device__ __forceinline__ void load_normalized(T* tile) const {
        const T* from = static_cast<const T*>(p.x) + pixels_of_map();
#pragma unroll 4
        for (int row = 0; row < kRows; ++row) {
            const int pixel_of_row = pixel(row);
            Row<T, H::kDepth / 4> z;
            z.load(from + pixel_of_row * p.channels, pixel_of_row < 0 ? 0 : p.channels);
            z.normalize(p.channels, p.eps);
            z.store(tile + row * p.pitch(), p.channels);
        }
        __syncwarp();
    }

    // Rows of a map in the order of pixels, zeros for those that are not there.
    __device__ __forceinline__ void load_pixels(T* tile, const void* maps) const {
        const T* from = static_cast<const T*>(maps) + pixels_of_map();
        gather_rows<kRowLanes>(tile, p.pitch(), p.channels, from, p.channels,
                               [&](int row) { return pixel(row); });
    }
    __device__ __forceinline__ void store_pixels(const T* tile, void* maps) const {
        T* to = static_cast<T*>(maps) + pixels_of_map();
        scatter_rows<kRowLanes>(tile, p.pitch(), p.channels, to, p.channels,
                                [&](int row) { return pixel(row); });
    }
    // In the order of the windows.
    __device__ __forceinline__ void store_tokens(const T* tile, void* maps) const {
        T* to = static_cast<T*>(maps) + tokens_of_map();
        scatter_rows<kRowLanes>(tile, p.pitch(), p.channels, to, p.channels,
                                [&](int row) { return token(row); });
    }
};

// ---- stages

// Some rows of a square weight, zeros beyond the last.
template <typename H>
__device__ __forceinline__ void fetch_weight(char* stage, const void* weight, int first, const Problem& p) {
    using T = typename H::Number;
    fetch_rows<2 * H::kDepth>(reinterpret_cast<T*>(stage), p.pitch(), H::kWeightRows, p.channels,
                              static_cast<const T*>(weight) + first * p.channels, p.channels,
                              p.channels - first, p.channels);
}

// One head of some rows of two tensors [limit, channels], the second one `room` rows behind the first; zeros
// beyond the limit and beyond the head.
template <int kHead, typename T>
__device__ __forceinline__ void fetch_head(char* stage, const T* one, const T* two, int first, int limit,
                                           int room, int head, const Problem& p) {
    constexpr int kPitch = kHead + kPadding;
    const int rows = min(room, ceil_div(limit - first, kKeyStep) * kKeyStep), width = p.head_width();
    const int from = first * p.channels + head * width;
    T* to = reinterpret_cast<T*>(stage);
    fetch_rows<kHead / 8>(to, kPitch, rows, kHead, one + from, p.channels, limit - first, width);
    fetch_rows<kHead / 8>(to + room * kPitch, kPitch, rows, kHead, two + from, p.channels, limit - first,
                          width);
}

// ---- products

template <int kDepth, typename T>
__device__ __forceinline__ void load_rows(uint32_t (&a)[kDepth][4], const T* tile, const Problem& p) {
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
        if (k * 16 < p.channels) load_left(a[k], tile + k * 16, p.pitch());
    __syncwarp();
}

// The warp's rows, times a weight that comes by rows: body(half, column, low, high).
template <typename H, typename Stages, typename Body>
__device__ __forceinline__ void project(const uint32_t (&rows)[H::kDepth][4], Stages& stages,
                                        const Problem& p, const Body& body) {
    using T = typename H::Number;
    for (int first = 0; first < p.channels; first += H::kWeightRows) {
        const T* weight = stages.template next<T>();
        const int end = min(first + H::kWeightRows, p.channels);
#pragma unroll 1
        for (int column = first; column < end; column += 16, weight += 16 * p.pitch()) {
            float sums[2][4] = {};
#pragma unroll
            for (int k = 0; k < H::kDepth; ++k)
                if (k * 16 < p.channels) multiply<T, 2, false>(sums, rows[k], weight + k * 16, p.pitch());
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    body(half, column + sum_column(n), sums[n][2 * half], sums[n][2 * half + 1]);
            __syncwarp();  // products follow
        }
    }
}

// Replaces normalised pixels by queries, for scores to base 2.
template <typename H, typename Stages>
__device__ __forceinline__ void make_queries(const Queries<H>& queries, typename H::Number* tile,
                                             Stages& stages, const Problem& p) {
    using T = typename H::Number;
    const T* query_map = static_cast<const T*>(p.query_map) +
                         int64_t(queries.map / p.num_classes) * p.num_pixels() * p.channels;
    const float scale = kLog2e / std::sqrt(float(p.head_width()));
    const int pixels[2] = {queries.pixel(sum_row(0)), queries.pixel(sum_row(1))};
    uint32_t z[H::kDepth][4];
    load_rows(z, tile, p);
    project<H>(z, stages, p, [&](int half, int column, float low, float high) {
        Pair<T> query{low, high};
        if (pixels[half] >= 0) {
            const auto guided = Pair<T>::load(query_map + pixels[half] * p.channels + column);
            query.low += guided.low, query.high += guided.high;
        }
        query.low *= scale, query.high *= scale;
        query.store(tile + sum_row(half) * p.pitch() + column);
    });
    __syncwarp();
}

// ---- forward

// The mixture of one head in the place of its queries, and the log sums.
template <typename H, typename Stages>
__device__ __forceinline__ void attend(const Queries<H>& queries, typename H::Number* tile, Stages& stages,
                                       const Problem& p, const Plan& plan, int head, float* log_sums) {
    using T = typename H::Number;
    constexpr int kHead = H::kHead;
    const int width = p.head_width();
    Head<kHead> query;
    query.load(tile + head * width, p.pitch(), width);
    Mixture<T, kHead> mixture;
    for (int part = 0; part < plan.parts; ++part) {
        const T* key = stages.template next<T>();
        const T* value = key + plan.stage_keys * H::kHeadPitch;
        for (int left = min(plan.stage_keys, p.num_keys() - part * plan.stage_keys); left > 0;
             left -= kKeyStep) {
            mixture.template add<kKeyStep>(query, key, value, 1.0f, Leading{left});
            key += kKeyStep * H::kHeadPitch, value += kKeyStep * H::kHeadPitch;
        }
    }
    mixture.finish();
    for_pairs<T>(mixture.mixed, width, [&](int half, int column, Pair<T> mixed) {
        mixed.store(tile + sum_row(half) * p.pitch() + head * width + column);
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = queries.token(sum_row(half));
        if (log_sums && t >= 0 && threadIdx.x % 4 == 0)
            log_sums[(int64_t(queries.map) * p.heads + head) * p.num_tokens() + t] = mixture.log_sum(half);
    }
    __syncwarp();  // products follow
}

// Grid: tiles of queries of all maps.
template <typename H>
__global__ void __launch_bounds__(H::kThreads, H::kBlocks)
    spatial_attention_fwd_kernel(Problem p, Forward f, Plan plan) {
    using T = typename H::Number;
    const Queries<H> queries(p);
    T* tiles = reinterpret_cast<T*>(dynamic_shared());
    T* tile = tiles + threadIdx.x / kWarpSize * kRows * p.pitch();
    const int64_t keys = int64_t(queries.map) * p.num_keys() * p.channels;
    const int weights = ceil_div(p.channels, H::kWeightRows), parts = p.heads * plan.parts;
    const auto fetch = [&](int i, char* stage) {
        if (i < weights) {
            fetch_weight<H>(stage, p.query_weight, i * H::kWeightRows, p);
        } else if (i -= weights; i < parts) {
            fetch_head<H::kHead>(stage, static_cast<const T*>(p.key) + keys,
                                 static_cast<const T*>(p.value) + keys, i % plan.parts * plan.stage_keys,
                                 p.num_keys(), plan.stage_keys, i / plan.parts, p);
        } else {
            fetch_weight<H>(stage, f.out_weight, (i - parts) * H::kWeightRows, p);
        }
    };
    Stream stages(reinterpret_cast<char*>(tiles + H::kQueries * p.pitch()), plan.stage_bytes,
                  2 * weights + parts, fetch);
    queries.clear_padding(tile);
    queries.load_normalized(tile);
    make_queries<H>(queries, tile, stages, p);
    for (int head = 0; head < p.heads; ++head) attend<H>(queries, tile, stages, p, plan, head, f.log_sums);
    if (f.mixture) queries.store_pixels(tile, f.mixture);
    uint32_t mixture[H::kDepth][4];
    load_rows(mixture, tile, p);
    queries.load_pixels(tile, p.x);
    const float kept = f.drop_path ? widen(static_cast<const T*>(f.drop_path)[queries.map]) : 1.0f;
    project<H>(mixture, stages, p, [&](int half, int column, float low, float high) {
        T* place = tile + sum_row(half) * p.pitch() + column;
        const auto bias = Pair<T>::load(static_cast<const T*>(f.out_bias) + column), x = Pair<T>::load(place);
        Pair<T>{x.low + kept * (low + bias.low), x.high + kept * (high + bias.high)}.store(place);
    });
    queries.store_pixels(tile, f.out);
}

// ---- backward, attention

// The gradient of one head's queries in their place, from the queries and the mixture's gradient.
template <typename H, typename Stages>
__device__ __forceinline__ void attend_bwd(const Queries<H>& queries, typename H::Number* tile,
                                           const typename H::Number* grads, Stages& stages, const Problem& p,
                                           const Backward& b, const Plan& plan, int head) {
    using T = typename H::Number;
    constexpr int kHead = H::kHead;
    const int width = p.head_width();
    const T* mixture = static_cast<const T*>(b.mixture) + queries.pixels_of_map() + head * width;
    const int64_t first_token = (int64_t(queries.map) * p.heads + head) * p.num_tokens();
    tile += head * width, grads += head * width;
    Head<kHead> query, mixture_grad;
    query.load(tile, p.pitch(), width), mixture_grad.load(grads, p.pitch(), width);
    Statistics statistics[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int pixel = queries.pixel(sum_row(half)), t = queries.token(sum_row(half));
#pragma unroll
        for (int n = 0; n < kHead / 8; ++n)
            if (n * 8 < width && pixel >= 0) {
                const auto mixed = Pair<T>::load(mixture + pixel * p.channels + sum_column(n));
                const auto grad = Pair<T>::load(grads + sum_row(half) * p.pitch() + sum_column(n));
                statistics[half].delta += mixed.low * grad.low + mixed.high * grad.high;
            }
        statistics[half].delta = quad_sum(statistics[half].delta);
        if (t < 0) continue;
        statistics[half].log_sum = b.log_sums[first_token + t];
        if (threadIdx.x % 4 == 0) b.deltas[first_token + t] = statistics[half].delta;
    }
    float query_grad[kHead / 8][4] = {};
    for (int part = 0; part < plan.parts; ++part) {
        const T* key = stages.template next<T>();
        const T* value = key + plan.stage_keys * H::kHeadPitch;
        for (int left = min(plan.stage_keys, p.num_keys() - part * plan.stage_keys); left > 0;
             left -= kKeyStep) {
            add_query_grad<T, kHead, kKeyStep>(query_grad, query, mixture_grad, key, value, 1.0f, statistics,
                                               Leading{left});
            key += kKeyStep * H::kHeadPitch, value += kKeyStep * H::kHeadPitch;
        }
    }
    const float scale = 1.0f / std::sqrt(float(width));
    for_pairs<T>(query_grad, width, [&](int half, int column, Pair<T> grad) {
        Pair<T>{scale * grad.low, scale * grad.high}.store(tile + sum_row(half) * p.pitch() + column);
    });
}

// Grid: tiles of queries of all maps.
template <typename H>
__global__ void __launch_bounds__(H::kThreads, H::kBlocks)
    spatial_attention_bwd_queries_kernel(Problem p, Backward b, Plan plan) {
    using T = typename H::Number;
    const Queries<H> queries(p);
    T* tiles = reinterpret_cast<T*>(dynamic_shared());
    T* tile = tiles + threadIdx.x / kWarpSize * kRows * p.pitch();
    T* grads = tile + H::kQueries * p.pitch();
    const int64_t keys = int64_t(queries.map) * p.num_keys() * p.channels;
    const int weights = ceil_div(p.channels, H::kWeightRows);
    const auto fetch = [&](int i, char* stage) {
        if (i < weights) {
            fetch_weight<H>(stage, p.query_weight, i * H::kWeightRows, p);
        } else if (i -= weights; i < weights) {
            fetch_weight<H>(stage, b.out_weight_transposed, i * H::kWeightRows, p);
        } else {
            i -= weights;
            fetch_head<H::kHead>(stage, static_cast<const T*>(p.key) + keys,
                                 static_cast<const T*>(p.value) + keys, i % plan.parts * plan.stage_keys,
                                 p.num_keys(), plan.stage_keys, i / plan.parts, p);
        }
    };
    Stream stages(reinterpret_cast<char*>(tiles + 2 * H::kQueries * p.pitch()), plan.stage_bytes,
                  2 * weights + p.heads * plan.parts, fetch);
    queries.clear_padding(tile), queries.clear_padding(grads);
    queries.load_normalized(tile);
    queries.store_tokens(tile, b.z);
    make_queries<H>(queries, tile, stages, p);
    queries.store_tokens(tile, b.query);

    queries.load_pixels(grads, b.grad);
    uint32_t rows[H::kDepth][4];
    load_rows(rows, grads, p);
    project<H>(rows, stages, p, [&](int half, int column, float low, float high) {
        Pair<T>{low, high}.store(grads + sum_row(half) * p.pitch() + column);
    });
    queries.store_tokens(grads, b.mixture_grad);
    for (int head = 0; head < p.heads; ++head) attend_bwd<H>(queries, tile, grads, stages, p, b, plan, head);
    queries.store_tokens(tile, b.query_grad);
}

constexpr int kKeyThreads = 128, kKeys = kKeyThreads / kWarpSize * kRows;

// Keys are rows here, and queries come in stages of as many. Grid: tiles of keys of all maps, heads.
template <typename T, int kHead>
__global__ void __launch_bounds__(kKeyThreads, kHead <= 32 ? 3 : 2)
    spatial_attention_bwd_keys_kernel(Problem p, Backward b) {
    constexpr int kPitch = kHead + kPadding;
    const int tiles = ceil_div(p.num_keys(), kKeys), map = blockIdx.x / tiles, head = blockIdx.y;
    const int first = (blockIdx.x - map * tiles) * kKeys, num_tokens = p.num_tokens(), width = p.head_width();
    const int64_t keys = int64_t(map) * p.num_keys() * p.channels;
    const int64_t tokens = int64_t(map) * num_tokens * p.channels;
    const auto fetch = [&](int i, char* stage) {
        const void* one = i ? b.query : p.key;
        const void* two = i ? b.mixture_grad : p.value;
        const int64_t offset = i ? tokens : keys;
        fetch_head<kHead>(stage, static_cast<const T*>(one) + offset, static_cast<const T*>(two) + offset,
                          i ? (i - 1) * kKeys : first, i ? num_tokens : p.num_keys(), kKeys, head, p);
    };
    Stream stages(dynamic_shared(), 2 * kKeys * kPitch * int(sizeof(T)), 1 + ceil_div(num_tokens, kKeys),
                  fetch);
    const int own_row = threadIdx.x / kWarpSize * kRows;
    const T* own = stages.template next<T>() + own_row * kPitch;
    Head<kHead> key, value;
    key.load(own, kPitch, width), value.load(own + kKeys * kPitch, kPitch, width);
    const float* log_sums = b.log_sums + (int64_t(map) * p.heads + head) * num_tokens;
    const float* deltas = b.deltas + (int64_t(map) * p.heads + head) * num_tokens;

    float key_grad[kHead / 8][4] = {}, value_grad[kHead / 8][4] = {};
    for (int start = 0; start < num_tokens; start += kKeys) {
        const T* query = stages.template next<T>();
        const int end = first + own_row < p.num_keys() ? min(start + kKeys, num_tokens) : start;
        for (int t = start; t < end; t += kKeyStep, query += kKeyStep * kPitch) {
            // Past the last token queries and gradients are zeros, and add nothing.
            const auto statistics = [&](int column) {
                const int token = t + column;
                return token < num_tokens ? Statistics{log_sums[token], deltas[token]} : Statistics{};
            };
            add_key_grads<T, kHead, kKeyStep>(key_grad, value_grad, key, value, query, query + kKeys * kPitch,
                                              1.0f, statistics, Everything{});
        }
    }
    const auto store = [&](const float (&sums)[kHead / 8][4], void* grads, float factor) {
        for_pairs<T>(sums, width, [&](int half, int column, Pair<T> grad) {
            const int row = first + own_row + sum_row(half);
            if (row < p.num_keys())
                Pair<T>{factor * grad.low, factor * grad.high}.store(
                    static_cast<T*>(grads) + keys + row * p.channels + head * width + column);
        });
    };
    store(key_grad, b.key_grad, kLn2), store(value_grad, b.value_grad, 1.0f);
}

// ---- rows beside the attention: a warp each

constexpr int kRowThreads = 128, kMostPairs = kMaxChannels / 64;

__device__ __forceinline__ int64_t own_row() {
    return int64_t(blockIdx.x) * (kRowThreads / kWarpSize) + threadIdx.x / kWarpSize;
}

// Normalised pixels of whole windows, `windows` [maps, num_keys, window window channels].
template <typename T>
__global__ void __launch_bounds__(kRowThreads) spatial_attention_windows_kernel(Problem p, void* windows) {
    const int area = p.window * p.window, tokens = p.num_keys() * area;
    const int64_t row = own_row(), map = row / tokens;
    if (map >= p.maps) return;
    const int t = int(row - map * tokens), across = p.width / p.window, within = t % area;
    const int y = t / area / across * p.window + within / p.window;
    const int x = t / area % across * p.window + within % p.window;
    Row<T, kMostPairs> z;
    z.load(static_cast<const T*>(p.x) + (map * p.num_pixels() + y * p.width + x) * p.channels, p.channels);
    z.normalize(p.channels, p.eps);
    z.store(static_cast<T*>(windows) + row * p.channels, p.channels);
}

// `x_grad` [maps, num_pixels, channels]: `grad` and, through the normalisation, `z_grad` [maps, num_tokens,
// channels].
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    spatial_attention_bwd_pixels_kernel(Problem p, const void* grad, const void* z_grad, void* x_grad) {
    const int64_t row = own_row(), map = row / p.num_pixels(), place = row * p.channels;
    if (map >= p.maps) return;
    const int pixel = int(row - map * p.num_pixels()), y = pixel / p.width, x = pixel % p.width;
    const int window = y / p.window * p.across() + x / p.window;
    const int64_t t = window * p.window * p.window + y % p.window * p.window + x % p.window;
    Row<T, kMostPairs> z, dz, dx;
    z.load(static_cast<const T*>(p.x) + place, p.channels);
    const float inverse = z.normalize(p.channels, p.eps);
    dz.load(static_cast<const T*>(z_grad) + (map * p.num_tokens() + t) * p.channels, p.channels);
    dx.load(static_cast<const T*>(grad) + place, p.channels);
    const float mean = dz.sum() / p.channels, along = dz.dot(z) / p.channels;
    dx.change(p.channels, [&](int i, Pair<T>& v) {
        v.low += inverse * (dz.pairs[i].low - mean - z.pairs[i].low * along);
        v.high += inverse * (dz.pairs[i].high - mean - z.pairs[i].high * along);
    });
    dx.store(static_cast<T*>(x_grad) + place, p.channels);
}

// Rows of reduced windows, as many columns as channels or twice that.
struct Reduced {
    errseg::Number type;
    int64_t rows;  // of images, classes, keys
    int columns, num_classes, num_keys;
    const void* added;  // to the rows: [images, num_keys, columns], or [columns] where per_key is false
    bool per_key;
    float eps;
};

// Brings the rows to a root mean square of one; `gradient` of those becomes that of the rows before.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    spatial_attention_rows_kernel(Reduced r, void* rows, void* gradient) {
    const int64_t row = own_row();
    if (row >= r.rows) return;
    const int64_t image = row / (int64_t(r.num_classes) * r.num_keys);
    const int64_t added = r.per_key ? image * r.num_keys + row % r.num_keys : 0;
    T* place = static_cast<T*>(rows) + row * r.columns;
    Row<T, 2 * kMostPairs> u, bias;
    u.load(place, r.columns);
    bias.load(static_cast<const T*>(r.added) + added * r.columns, r.columns);
    u.change(r.columns, [&](int i, Pair<T>& v) { v.low += bias.pairs[i].low, v.high += bias.pairs[i].high; });
    const float inverse = 1.0f / std::sqrt(u.dot(u) / r.columns + r.eps);
    u.scale(inverse);
    u.store(place, r.columns);
    if (!gradient) return;
    T* to = static_cast<T*>(gradient) + row * r.columns;
    Row<T, 2 * kMostPairs> du;
    du.load(to, r.columns);
    const float along = du.dot(u) / r.columns;
    du.change(r.columns, [&](int i, Pair<T>& v) {
        v.low = inverse * (v.low - u.pairs[i].low * along),
        v.high = inverse * (v.high - u.pairs[i].high * along);
    });
    du.store(to, r.columns);
}

// ---- launches; all of them need at least one map, pixel and key

// Calls `body(How{})` with what the sizes need.
template <typename Body>
cudaError_t visit(const Problem& p, const Body& body) {
    return visit_type(p.type, [&](auto number) {
        using T = decltype(number);
        const bool narrow_head = p.head_width() <= 32;
        if (p.channels <= 128) return narrow_head ? body(How<T, 8, 32>{}) : body(How<T, 8, 64>{});
        return narrow_head ? body(How<T, 16, 32>{}) : body(How<T, 16, 64>{});
    });
}

// `room` is what a block should keep to of shared memory.
inline cudaError_t forward(const Problem& p, const Forward& f, int room, cudaStream_t stream) {
    return visit(p, [&](auto how) {
        using H = decltype(how);
        const Plan plan = Plan::make<H>(p, 1, room);
        return launch(spatial_attention_fwd_kernel<H>, p.maps * ceil_div(p.num_tokens(), H::kQueries),
                      H::kThreads, plan.bytes, stream, p, f, plan);
    });
}

inline cudaError_t backward(const Problem& p, const Backward& b, int room, cudaStream_t stream) {
    const cudaError_t error = visit(p, [&](auto how) {
        using H = decltype(how);
        const Plan plan = Plan::make<H>(p, 2, room);
        return launch(spatial_attention_bwd_queries_kernel<H>, p.maps * ceil_div(p.num_tokens(), H::kQueries),
                      H::kThreads, plan.bytes, stream, p, b, plan);
    });
    if (error != cudaSuccess) return error;
    return visit_type(p.type, [&](auto number) {
        using T = decltype(number);
        const dim3 grid(p.maps * ceil_div(p.num_keys(), kKeys), p.heads);
        const bool narrow_head = p.head_width() <= 32;
        const auto kernel =
            narrow_head ? spatial_attention_bwd_keys_kernel<T, 32> : spatial_attention_bwd_keys_kernel<T, 64>;
        const size_t bytes = 2 * 2 * kKeys * ((narrow_head ? 32 : 64) + kPadding) * sizeof(T);
        return launch(kernel, grid, kKeyThreads, bytes, stream, p, b);
    });
}

inline int row_blocks(int64_t rows) {
    return int(ceil_div(rows, int64_t(kRowThreads / kWarpSize)));
}

inline cudaError_t make_windows(const Problem& p, void* windows, cudaStream_t stream) {
    return visit_type(p.type, [&](auto number) {
        const int64_t rows = int64_t(p.maps) * p.num_keys() * p.window * p.window;
        return launch(spatial_attention_windows_kernel<decltype(number)>, row_blocks(rows), kRowThreads, 0,
                      stream, p, windows);
    });
}

inline cudaError_t backward_pixels(const Problem& p, const void* grad, const void* z_grad, void* x_grad,
                                   cudaStream_t stream) {
    return visit_type(p.type, [&](auto number) {
        return launch(spatial_attention_bwd_pixels_kernel<decltype(number)>,
                      row_blocks(int64_t(p.maps) * p.num_pixels()), kRowThreads, 0, stream, p, grad, z_grad,
                      x_grad);
    });
}

inline cudaError_t normalize_rows(const Reduced& r, void* rows, void* gradient, cudaStream_t stream) {
    return visit_type(r.type, [&](auto number) {
        return launch(spatial_attention_rows_kernel<decltype(number)>, row_blocks(r.rows), kRowThreads, 0,
                      stream, r, rows, gradient);
    });
}

}  // namespace errseg::spatial_attention
