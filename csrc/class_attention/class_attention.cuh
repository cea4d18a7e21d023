// The class block on tensor cores: pooling, attention among the classes of each pixel, gated MLP, residuals.
//
// A block owns some pooled pixels with all of their classes: its row r is class r % K of pixel r // K. A warp takes
// 16 rows through two tiles in shared memory; weights come in stages that the whole block shares, keys and values
// of one head lie beside them. A row sees the keys of its own pixel, which are looked for from a multiple of 16 on.
//
// Backward, from the pooled map: one launch makes the sum of map and attention anew and takes the gradient through
// the MLP, the next one through the attention and to x. What the weights' gradients are products of they leave
// row after row. So every number has one writer.
#pragma once

#include <algorithm>

#include "common/heads.cuh"

namespace errseg::class_attention {

constexpr int kKeyStep = 16;  // keys or queries at a time

enum Of { kKey, kValue, kQuery, kMixtureGrad };  // arrays of a head, in the order they are made

struct Problem {
    errseg::Number type;
    int batch, num_classes, height, width, channels, heads, hidden;  // of the pooled map
    float eps;
    const void *query_text, *key_text;                                  // [batch, num_classes, channels]
    const void *query_weight, *key_weight, *value_weight, *value_bias;  // [channels, channels], [channels]
    const void *out_weight, *out_bias;                                  // [channels, channels], [channels]
    const void *gate_weight, *gate_bias;                                // [hidden, channels], [hidden]
    const void *unit_weight, *unit_bias;                                // the same: what is gated
    const void *mlp_out_weight, *mlp_out_bias;                          // [channels, hidden], [channels]
    const void *drop_attention, *drop_mlp;                              // [batch, height, width], or null
    bool attends;  // false: rows are the sums of map and attention already

    __host__ __device__ int area() const { return height * width; }
    __host__ __device__ int head_width() const { return channels / heads; }
    __host__ __device__ int pitch() const { return channels + kPadding; }
    __device__ const void* head_weight(int which) const {
        return which == kKey ? key_weight : which == kValue ? value_weight : query_weight;
    }
    __host__ __device__ float scale() const { return kLog2e / std::sqrt(float(head_width())); }
};

// The left factor of products, a warp's rows: in shared memory, or the first 16 kHeld columns in registers.
template <typename T>
struct Lying {
    const T* tile;
    int pitch;

    __device__ __forceinline__ Lying(const T* rows, const Problem& p) : tile(rows), pitch(p.pitch()) {}
    __device__ __forceinline__ void get(uint32_t (&a)[4], int k) const { load_left(a, tile + k * 16, pitch); }
};

template <typename T, int kHeld>
struct Held {
    Lying<T> lying;
    uint32_t parts[kHeld][4];

    __device__ __forceinline__ Held(const T* tile, const Problem& p) : lying(tile, p) {
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kHeld; ++k)
            if (k * 16 < p.channels) lying.get(parts[k], k);
        __syncwarp();
    }
    __device__ __forceinline__ void get(uint32_t (&a)[4], int k) const {
        if (k >= kHeld) return lying.get(a, k);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = parts[k][i];
    }
};

// What a kernel is compiled for: 16 kDepth channels at most, and heads that fit into kHead.
template <typename T, int kDepth_, int kHead_>
struct How {
    using Number = T;
    // Of the MLP: as much in registers as they hold without spills.
    using Left = std::conditional_t<kDepth_ <= 8, Held<T, 6>, Lying<T>>;
    using BackwardLeft = std::conditional_t<kDepth_ <= 8, Held<T, 4>, Lying<T>>;
    static constexpr int kDepth = kDepth_, kHead = kHead_, kHeadPitch = kHead + kPadding;
    static constexpr int kWarps = kDepth <= 8 ? 6 : 4, kThreads = kWarps * kWarpSize;  // at most
    static constexpr int kBlocks = kDepth <= 8 ? 2 : 1;                                // on a multiprocessor
    static constexpr int kWeightRows = 32, kHeadStages = ceil_div(kHead, kWeightRows);
    static constexpr int kUnits = kDepth <= 8 ? 32 : 16,
                         kUnitPitch = kUnits + kPadding;  // of the MLP, at a time
};

struct Forward {
    const void* x;  // [batch, num_classes, in_height, in_width, channels], or the sums
    int in_height, in_width;
    void* pooled;  // [batch, num_classes, height, width, channels], or null when nobody wants it
    void* out;     // the same
};

// Rows of the launch: pixel after pixel, with all of their classes.
struct BackwardMLP {
    const void* grad;    // [batch, num_classes, height, width, channels]
    const void* source;  // the same: the pooled map, or the sums where there is no attention
    void *z, *branch;    // [rows, channels]: normalised sums; gradient of what the MLP gives
    void* units;         // [rows, hidden]
    void* units_grad;    // [rows, 2, hidden]: of gates and of what is gated
    void* sum_grad;      // [rows, channels]
};

struct BackwardAttention {
    const void* sum_grad;               // [rows, channels]
    const void* pooled;                 // [batch, num_classes, height, width, channels]
    const void* out_weight_transposed;  // [channels, channels]
    void *z, *branch;  // [rows, channels]: normalised map; gradient of what the attention gives
    void* mixture;     // [rows, channels]
    void* heads_grad;  // [rows, 3, channels]: of keys, values and queries
    void* x_grad;      // [batch, num_classes, in_height, in_width, channels], or null
    int in_height, in_width;
};

// What a multiprocessor gives, and how many there are.
struct Device {
    int block_bytes, multiprocessors;
};

// How a launch goes over pixels [first, first + count) of all images, and a block's shared memory is cut: two
// tiles, then stages with a head's rows beside them, or the MLP's larger stages.
struct Plan {
    int first, count, pixels, warps;
    int stage_bytes, mlp_stage_bytes, bytes;

    __host__ __device__ int rows() const { return warps * kRows; }
    int blocks() const { return ceil_div(count, pixels); }

    // As many pixels to a block as its memory holds, fewer where multiprocessors would be left without work;
    // `arrays` of rows of a head, statistics or not. No pixels: not even one fits.
    template <typename H>
    static Plan make(const Problem& p, int first, int count, int arrays, const Device& device) {
        Plan plan{};
        plan.first = first, plan.count = count;
        const int wanted = std::max(1, ceil_div(count, std::max(1, device.multiprocessors)));
        const int most = std::min(wanted, H::kWarps * kRows / p.num_classes);
        for (plan.pixels = most; plan.pixels > 0; --plan.pixels) {
            plan.cut<H>(p, arrays);
            if (plan.bytes <= device.block_bytes) break;
        }
        return plan;
    }

    template <typename H>
    void cut(const Problem& p, int arrays) {
        constexpr int kBytes = 2;
        warps = ceil_div(pixels * p.num_classes, kRows);
        stage_bytes = H::kWeightRows * p.pitch() * kBytes;
        mlp_stage_bytes = arrays > 2 ? 0 : (2 * H::kUnits * p.pitch() + p.channels * H::kUnitPitch) * kBytes;
        const int beside =
            rows() * (arrays * H::kHeadPitch * kBytes + (arrays > 2 ? int(sizeof(Statistics)) : 0));
        bytes = 2 * rows() * p.pitch() * kBytes + std::max(2 * stage_bytes + beside, 2 * mlp_stage_bytes);
    }
};

constexpr int kForwardArrays = 2, kBackwardArrays = 4;

// ---- a warp's rows

struct Seen {
    int first[2], count;

    __device__ __forceinline__ bool operator()(int half, int row) const {
        return row >= first[half] && row < first[half] + count;
    }
};

template <typename H>
struct Rows {
    using T = typename H::Number;
    static constexpr int kRowLanes = 2 * H::kDepth;  // threads that copy a row
    using Numbers = Row<T, H::kDepth / 4>;

    const Problem& p;
    int first;        // of the block's rows
    int own_place;    // of row lane % 16 in [batch, num_classes, height, width], or -1
    int64_t own_row;  // of the launch: that of row 0

    __device__ Rows(const Problem& problem, const Plan& plan) : p(problem) {
        first = threadIdx.x / kWarpSize * kRows;
        own_row = int64_t(blockIdx.x) * plan.pixels * p.num_classes + first;
        const int r = first + threadIdx.x % kRows, within = r / p.num_classes;
        const int nth = blockIdx.x * plan.pixels + within, pixel = plan.first + nth, image = pixel / p.area();
        const int label = r - within * p.num_classes;
        const bool there = within < plan.pixels && nth < plan.count;
        own_place = there ? (image * p.num_classes + label) * p.area() + pixel - image * p.area() : -1;
    }

    // Every lane of the warp asks.
    __device__ __forceinline__ int place(int row) const { return __shfl_sync(kFullWarp, own_place, row); }

    // Which of the block's rows are of the pixel of a lane's two rows.
    __device__ __forceinline__ Seen seen() const {
        const int own = first + sum_row(0), k = p.num_classes;
        return {{own / k * k, (own + 8) / k * k}, k};
    }
    // From where to where the warp looks for keys, in whole steps.
    __device__ __forceinline__ int start() const {
        return first / p.num_classes * p.num_classes / kKeyStep * kKeyStep;
    }
    __device__ __forceinline__ int end(const Plan& plan) const {
        return min(((first + kRows - 1) / p.num_classes + 1) * p.num_classes, plan.rows());
    }

    // What is added to keys, values or queries.
    __device__ __forceinline__ const T* added(int which, int at) const {
        if (which == kValue) return static_cast<const T*>(p.value_bias);
        return static_cast<const T*>(which == kKey ? p.key_text : p.query_text) +
               int64_t(at / p.area()) * p.channels;
    }
    __device__ __forceinline__ float kept(const void* mask, int at) const {
        if (!mask || at < 0) return 1.0f;
        const int image = at / (p.num_classes * p.area());
        return widen(static_cast<const T*>(mask)[image * p.area() + at % p.area()]);
    }
    // Where the first of the four pixels lies that a pooled one is the mean of.
    __device__ __forceinline__ int64_t corner(int at, int in_height, int in_width) const {
        const int map = at / p.area(), pixel = at - map * p.area(), y = pixel / p.width;
        return ((int64_t(map) * in_height + 2 * y) * in_width + 2 * (pixel - y * p.width)) * p.channels;
    }

    // Means of 2 x 2 pixels, zeros for rows that are not there.
    __device__ __forceinline__ void load_pooled(T* tile, const void* x, int in_height, int in_width) const {
#pragma unroll 2
        for (int row = 0; row < kRows; ++row) {
            const int at = place(row), columns = at < 0 ? 0 : p.channels;
            const T* from = static_cast<const T*>(x) + (at < 0 ? 0 : corner(at, in_height, in_width));
            Numbers cells[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                cells[i].load(from + (i / 2 * in_width + i % 2) * p.channels, columns);
            cells[0].add(cells[1]), cells[2].add(cells[3]), cells[0].add(cells[2]);
            cells[0].scale(0.25f);
            cells[0].store(tile + row * p.pitch(), p.channels);
        }
        __syncwarp();
    }
    __device__ __forceinline__ void load(T* tile, const void* maps) const {
        gather(tile, maps, p.channels, [&](int row) { return int64_t(place(row)); });
    }
    __device__ __forceinline__ void store(const T* tile, void* maps) const {
        scatter(tile, maps, [&](int row) { return int64_t(place(row)); });
    }
    // The same from and to rows of the launch.
    __device__ __forceinline__ void load_own(T* tile, const void* rows, int stride) const {
        gather(tile, rows, stride, [&](int row) { return place(row) < 0 ? int64_t(-1) : own_row + row; });
    }
    __device__ __forceinline__ void store_own(const T* tile, void* rows) const {
        scatter(tile, rows, [&](int row) { return place(row) < 0 ? int64_t(-1) : own_row + row; });
    }
    // Each row to its four pixels.
    __device__ __forceinline__ void store_cells(const T* tile, void* x, int in_height, int in_width) const {
        for_eights<kRowLanes>([&](int row, int column) {
            const int at = place(row);
            if (at < 0 || column >= p.channels) return;
            const uint4 numbers = *reinterpret_cast<const uint4*>(tile + row * p.pitch() + column);
            T* to = static_cast<T*>(x) + corner(at, in_height, in_width) + column;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                *reinterpret_cast<uint4*>(to + (i / 2 * in_width + i % 2) * p.channels) = numbers;
        });
    }
    // Normalises rows of one tile into another; gives one over the deviation of row lane % 16.
    __device__ __forceinline__ float normalize(const T* from, T* to) const {
        float own = 0.0f;
#pragma unroll 4
        for (int row = 0; row < kRows; ++row) {
            Numbers z;
            z.load(from + row * p.pitch(), p.channels);
            const float inverse = z.normalize(p.channels, p.eps);
            if (int(threadIdx.x) % kRows == row) own = inverse;
            z.store(to + row * p.pitch(), p.channels);
        }
        __syncwarp();
        return own;
    }

  private:
    template <typename Place>
    __device__ __forceinline__ void gather(T* tile, const void* rows, int stride,
                                           const Place& place_of) const {
        gather_rows<kRowLanes>(tile, p.pitch(), p.channels, static_cast<const T*>(rows), stride, place_of);
    }
    template <typename Place>
    __device__ __forceinline__ void scatter(const T* tile, void* rows, const Place& place_of) const {
        scatter_rows<kRowLanes>(tile, p.pitch(), p.channels, static_cast<T*>(rows), p.channels, place_of);
    }
};

// ---- stages

template <typename H>
__device__ __forceinline__ void fetch_weight(char* stage, const void* weight, int first, int known,
                                             const Problem& p) {
    using T = typename H::Number;
    fetch_rows<2 * H::kDepth>(reinterpret_cast<T*>(stage), p.pitch(), H::kWeightRows, p.channels,
                              static_cast<const T*>(weight) + int64_t(first) * p.channels, p.channels, known,
                              p.channels);
}

// Stage i of those of a head of a square weight.
template <typename H>
__device__ __forceinline__ void fetch_head(char* stage, const void* weight, int head, int i,
                                           const Problem& p) {
    const int first = i * H::kWeightRows;
    fetch_weight<H>(stage, weight, head * p.head_width() + first, p.head_width() - first, p);
}

// Some units of the MLP: rows of two weights, columns of the third.
template <typename H>
__device__ __forceinline__ void fetch_units(char* stage, int first, const Problem& p) {
    using T = typename H::Number;
    T* to = reinterpret_cast<T*>(stage);
    const int known = p.hidden - first;
    for (const void* weight : {p.gate_weight, p.unit_weight}) {
        fetch_rows<2 * H::kDepth>(to, p.pitch(), H::kUnits, p.channels,
                                  static_cast<const T*>(weight) + int64_t(first) * p.channels, p.channels,
                                  known, p.channels);
        to += H::kUnits * p.pitch();
    }
    fetch_rows<H::kUnits / 8>(to, H::kUnitPitch, p.channels, H::kUnits,
                              static_cast<const T*>(p.mlp_out_weight) + first, p.hidden, p.channels, known);
}

// ---- attention

// One head of a projection, zeros beyond its width.
template <typename H, typename Left, typename Stages>
__device__ __forceinline__ void project_head(float (&sums)[H::kHead / 8][4], const Left& left, Stages& stages,
                                             const Problem& p) {
    using T = typename H::Number;
    constexpr int kTiles = H::kWeightRows / 8;
#pragma unroll
    for (int i = 0; i < H::kHeadStages; ++i) {
        const T* weight = stages.template next<T>();
        float part[kTiles][4];
        clear(part);
#pragma unroll
        for (int k = 0; k < H::kDepth; ++k)
            if (k * 16 < p.channels) {
                uint32_t a[4];
                left.get(a, k);
                multiply<T, kTiles, false>(part, a, weight + k * 16, p.pitch(),
                                           p.head_width() - i * H::kWeightRows);
            }
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i * kTiles + n][j] = part[n][j];
    }
}

// Keys, values or queries of one head; of rows at `places`.
template <typename H, typename Left, typename Stages>
__device__ __forceinline__ void project_head(float (&sums)[H::kHead / 8][4], const Left& left, Stages& stages,
                                             const Rows<H>& rows, const int (&places)[2], int which,
                                             int head) {
    using T = typename H::Number;
    const int width = rows.p.head_width();
    project_head<H>(sums, left, stages, rows.p);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (places[half] < 0) continue;
        const T* added = rows.added(which, places[half]) + head * width;
#pragma unroll
        for (int n = 0; n < H::kHead / 8; ++n)
            if (n * 8 < width) {
                const auto pair = Pair<T>::load(added + sum_column(n));
                sums[n][2 * half] += pair.low, sums[n][2 * half + 1] += pair.high;
            }
    }
    __syncwarp();  // products follow
}

template <typename H>
__device__ __forceinline__ void store_head(typename H::Number* to, const float (&sums)[H::kHead / 8][4]) {
    using T = typename H::Number;
    for_pairs<T>(sums, H::kHead, [&](int half, int column, Pair<T> pair) {
        pair.store(to + sum_row(half) * H::kHeadPitch + column);
    });
}

// Replaces the pooled map in one tile by its sum with the attention; the other one is scratch. load() fills the
// first while weights are already on their way.
template <typename H, typename Load>
__device__ __forceinline__ void add_attention(const Rows<H>& rows, typename H::Number* tile,
                                              typename H::Number* scratch, char* memory, const Problem& p,
                                              const Plan& plan, const Load& load) {
    using T = typename H::Number;
    constexpr int kOfHead = 3 * H::kHeadStages;
    const auto fetch = [&](int i, char* stage) {
        if (i < p.heads * kOfHead) {
            const void* weight = p.head_weight(i % kOfHead / H::kHeadStages);
            fetch_head<H>(stage, weight, i / kOfHead, i % H::kHeadStages, p);
        } else {
            const int first = (i - p.heads * kOfHead) * H::kWeightRows;
            fetch_weight<H>(stage, p.out_weight, first, p.channels - first, p);
        }
    };
    Stream stages(memory, plan.stage_bytes, p.heads * kOfHead + ceil_div(p.channels, H::kWeightRows), fetch);
    T* keys = reinterpret_cast<T*>(memory + 2 * plan.stage_bytes);
    T* values = keys + plan.rows() * H::kHeadPitch;
    load();
    rows.normalize(tile, scratch);
    const int places[2] = {rows.place(sum_row(0)), rows.place(sum_row(1))};
    const Seen seen = rows.seen();
    const float scale = p.scale();
    {
        const Held<T, H::kDepth> z(scratch, p);
        for (int head = 0; head < p.heads; ++head) {
            float sums[H::kHead / 8][4];
#pragma unroll 1
            for (int which = kKey; which <= kQuery; ++which) {
                project_head<H>(sums, z, stages, rows, places, which, head);
                if (which != kQuery)
                    store_head<H>(keys + (which * plan.rows() + rows.first) * H::kHeadPitch, sums);
            }
            Head<H::kHead> query;
            query.template round<T>(sums);
            // The queries' stage has come since: keys and values are there.
            Mixture<T, H::kHead> mixture;
            for (int key = rows.start(); key < rows.end(plan); key += kKeyStep)
                mixture.template add<kKeyStep>(
                    query, keys + key * H::kHeadPitch, values + key * H::kHeadPitch, scale,
                    [&](int half, int column) { return seen(half, key + column); });
            mixture.finish();
            for_pairs<T>(mixture.mixed, p.head_width(), [&](int half, int column, Pair<T> pair) {
                pair.store(scratch + sum_row(half) * p.pitch() + head * p.head_width() + column);
            });
        }
    }
    const float kept[2] = {rows.kept(p.drop_attention, places[0]), rows.kept(p.drop_attention, places[1])};
    const Held<T, H::kDepth> mixture(scratch, p);
    for (int first = 0; first < p.channels; first += H::kWeightRows) {
        const T* weight = stages.template next<T>();
        constexpr int kTiles = H::kWeightRows / 8;
        float sums[kTiles][4];
        clear(sums);
#pragma unroll
        for (int k = 0; k < H::kDepth; ++k)
            if (k * 16 < p.channels)
                multiply<T, kTiles, false>(sums, mixture.parts[k], weight + k * 16, p.pitch(),
                                           p.channels - first);
        for_pairs<T>(sums, p.channels - first, [&](int half, int column, Pair<T> change) {
            T* place = tile + sum_row(half) * p.pitch() + first + column;
            const auto bias = Pair<T>::load(static_cast<const T*>(p.out_bias) + first + column);
            const auto before = Pair<T>::load(place);
            Pair<T>{before.low + kept[half] * (change.low + bias.low),
                    before.high + kept[half] * (change.high + bias.high)}
                .store(place);
        });
    }
    __syncthreads();  // the stages' memory is free
}

// ---- MLP

// 16 units: what gates them, what is gated.
template <typename T>
struct Units {
    float gates[2][4] = {}, values[2][4] = {};

    __device__ __forceinline__ void add_biases(int first, const Problem& p) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            if (first + n * 8 >= p.hidden) continue;
            const auto gate = Pair<T>::load(static_cast<const T*>(p.gate_bias) + first + sum_column(n));
            const auto value = Pair<T>::load(static_cast<const T*>(p.unit_bias) + first + sum_column(n));
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                gates[n][i] += gate.low, gates[n][i + 1] += gate.high;
                values[n][i] += value.low, values[n][i + 1] += value.high;
            }
        }
    }
};

// NaN stays NaN, and lets gradients through.
__device__ __forceinline__ float relu6(float v) {
    v = v < 0.0f ? 0.0f : v;
    return v > 6.0f ? 6.0f : v;
}
__device__ __forceinline__ bool relu6_moves(float v) {
    return !(v <= 0.0f || v >= 6.0f);
}

// What the MLP gives for normalised rows, without its last bias; 16 units at a time, for want of registers.
template <typename H, typename Left, typename Stages>
__device__ __forceinline__ void run_mlp(float (&out)[2 * H::kDepth][4], const Left& z, Stages& stages,
                                        const Problem& p) {
    using T = typename H::Number;
    clear(out);
    for (int first = 0; first < p.hidden; first += H::kUnits) {
        const T* gate_weight = stages.template next<T>();
        const T* unit_weight = gate_weight + H::kUnits * p.pitch();
        const T* out_weight = unit_weight + H::kUnits * p.pitch();
#pragma unroll 1
        for (int unit = 0; unit < H::kUnits; unit += 16) {
            Units<T> units;
#pragma unroll
            for (int k = 0; k < H::kDepth; ++k)
                if (k * 16 < p.channels) {
                    uint32_t a[4];
                    z.get(a, k);
                    multiply<T, 2, false>(units.gates, a, gate_weight + k * 16, p.pitch());
                    multiply<T, 2, false>(units.values, a, unit_weight + k * 16, p.pitch());
                }
            units.add_biases(first + unit, p);
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) units.values[n][i] *= relu6(units.gates[n][i]);
            uint32_t a[4];
            round_left<T>(a, units.values[0], units.values[1]);
            multiply<T, 2 * H::kDepth, false>(out, a, out_weight + unit, H::kUnitPitch, p.channels);
            gate_weight += 16 * p.pitch(), unit_weight += 16 * p.pitch();
        }
    }
}

// Where a block's memory is what.
template <typename H>
struct Memory {
    using T = typename H::Number;
    T *tile, *scratch;  // the warp's own rows
    char* stages;

    __device__ Memory(const Rows<H>& rows, const Problem& p, const Plan& plan) {
        T* tiles = reinterpret_cast<T*>(dynamic_shared());
        tile = tiles + rows.first * p.pitch(), scratch = tile + plan.rows() * p.pitch();
        stages = reinterpret_cast<char*>(tiles + 2 * plan.rows() * p.pitch());
    }
};

// Grid: pixels of all images, plan.pixels to a block.
template <typename H>
__global__ void __launch_bounds__(H::kThreads, H::kBlocks)
    class_attention_fwd_kernel(Problem p, Forward f, Plan plan) {
    using T = typename H::Number;
    const Rows<H> rows(p, plan);
    const Memory<H> memory(rows, p, plan);
    T* tile = memory.tile;
    if (p.attends) {
        add_attention<H>(rows, tile, memory.scratch, memory.stages, p, plan, [&] {
            rows.load_pooled(tile, f.x, f.in_height, f.in_width);
            if (f.pooled) rows.store(tile, f.pooled);
        });
    }
    const auto fetch = [&](int i, char* stage) { fetch_units<H>(stage, i * H::kUnits, p); };
    Stream stages(memory.stages, plan.mlp_stage_bytes, ceil_div(p.hidden, H::kUnits), fetch);
    if (!p.attends) rows.load(tile, f.x);
    __syncwarp();
    rows.normalize(tile, memory.scratch);
    float out[2 * H::kDepth][4];
    run_mlp<H>(out, typename H::Left(memory.scratch, p), stages, p);
    const float kept[2] = {rows.kept(p.drop_mlp, rows.place(sum_row(0))),
                           rows.kept(p.drop_mlp, rows.place(sum_row(1)))};
    for_pairs<T>(out, p.channels, [&](int half, int column, Pair<T> change) {
        T* place = tile + sum_row(half) * p.pitch() + column;
        const auto bias = Pair<T>::load(static_cast<const T*>(p.mlp_out_bias) + column),
                   u = Pair<T>::load(place);
        Pair<T>{u.low + kept[half] * relu6(change.low + bias.low),
                u.high + kept[half] * relu6(change.high + bias.high)}
            .store(place);
    });
    rows.store(tile, f.out);
}

// ---- backward

// Through the normalisation: factor (tile + inverse (dz - mean dz - z mean dz z)) in the place of the tile.
template <typename H>
__device__ __forceinline__ void normalize_bwd(const float (&dz)[2 * H::kDepth][4],
                                              const typename H::Number* z, typename H::Number* tile,
                                              float own_inverse, float factor, const Problem& p) {
    using T = typename H::Number;
    float mean[2] = {}, along[2] = {};
    for_pairs<T>(dz, p.channels, [&](int half, int column, Pair<T> d) {
        const auto pair = Pair<T>::load(z + sum_row(half) * p.pitch() + column);
        mean[half] += d.low + d.high, along[half] += d.low * pair.low + d.high * pair.high;
    });
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        mean[half] = quad_sum(mean[half]) / p.channels, along[half] = quad_sum(along[half]) / p.channels;
        inverse[half] = __shfl_sync(kFullWarp, own_inverse, sum_row(half));
    }
    for_pairs<T>(dz, p.channels, [&](int half, int column, Pair<T> d) {
        T* place = tile + sum_row(half) * p.pitch() + column;
        const auto pair = Pair<T>::load(z + sum_row(half) * p.pitch() + column),
                   before = Pair<T>::load(place);
        Pair<T>{factor * (before.low + inverse[half] * (d.low - mean[half] - pair.low * along[half])),
                factor * (before.high + inverse[half] * (d.high - mean[half] - pair.high * along[half]))}
            .store(place);
    });
    __syncwarp();
}

// 16 units of the MLP backward: what the weights' gradients need goes to memory.
template <typename H>
__device__ __forceinline__ void store_units(const Units<typename H::Number>& units,
                                            const float (&grads)[2][4], Units<typename H::Number>& units_grad,
                                            int first, const Rows<H>& rows, const bool (&there)[2],
                                            const BackwardMLP& b) {
    using T = typename H::Number;
    const int hidden = rows.p.hidden;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        float gated[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float gate = units.gates[n][i], value = units.values[n][i];
            gated[i] = relu6(gate) * value;
            units_grad.gates[n][i] = relu6_moves(gate) ? grads[n][i] * value : 0.0f;
            units_grad.values[n][i] = grads[n][i] * relu6(gate);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!there[half] || first + n * 8 >= hidden) continue;
            const int64_t row = rows.own_row + sum_row(half);
            const int unit = first + sum_column(n), i = 2 * half;
            Pair<T>{gated[i], gated[i + 1]}.store(static_cast<T*>(b.units) + row * hidden + unit);
            T* to = static_cast<T*>(b.units_grad) + row * 2 * hidden + unit;
            Pair<T>{units_grad.gates[n][i], units_grad.gates[n][i + 1]}.store(to);
            Pair<T>{units_grad.values[n][i], units_grad.values[n][i + 1]}.store(to + hidden);
        }
    }
    __syncwarp();  // products follow
}

// The gradient of normalised rows from that of what the MLP gives, both in shared memory.
template <typename H, typename Stages>
__device__ __forceinline__ void run_mlp_bwd(float (&dz)[2 * H::kDepth][4], const Lying<typename H::Number>& z,
                                            const Lying<typename H::Number>& branch, Stages& stages,
                                            const Rows<H>& rows, const BackwardMLP& b, const Problem& p) {
    using T = typename H::Number;
    const bool there[2] = {rows.place(sum_row(0)) >= 0, rows.place(sum_row(1)) >= 0};
    clear(dz);
    for (int first = 0; first < p.hidden; first += H::kUnits) {
        const T* gate_weight = stages.template next<T>();
        const T* unit_weight = gate_weight + H::kUnits * p.pitch();
        const T* out_weight = unit_weight + H::kUnits * p.pitch();
#pragma unroll 1
        for (int unit = 0; unit < H::kUnits; unit += 16) {
            Units<T> units, units_grad;
            float grads[2][4] = {};
#pragma unroll
            for (int k = 0; k < H::kDepth; ++k)
                if (k * 16 < p.channels) {
                    uint32_t a[4];
                    z.get(a, k);
                    multiply<T, 2, false>(units.gates, a, gate_weight + k * 16, p.pitch());
                    multiply<T, 2, false>(units.values, a, unit_weight + k * 16, p.pitch());
                    branch.get(a, k);
                    multiply<T, 2, true>(grads, a, out_weight + k * 16 * H::kUnitPitch + unit, H::kUnitPitch);
                }
            units.add_biases(first + unit, p);
            store_units<H>(units, grads, units_grad, first + unit, rows, there, b);
            uint32_t a[4];
            round_left<T>(a, units_grad.gates[0], units_grad.gates[1]);
            multiply<T, 2 * H::kDepth, true>(dz, a, gate_weight, p.pitch(), p.channels);
            round_left<T>(a, units_grad.values[0], units_grad.values[1]);
            multiply<T, 2 * H::kDepth, true>(dz, a, unit_weight, p.pitch(), p.channels);
            gate_weight += 16 * p.pitch(), unit_weight += 16 * p.pitch();
        }
    }
}

// Grid as of the forward kernel.
template <typename H>
__global__ void __launch_bounds__(H::kThreads, H::kBlocks)
    class_attention_bwd_mlp_kernel(Problem p, BackwardMLP b, Plan plan) {
    using T = typename H::Number;
    const Rows<H> rows(p, plan);
    const Memory<H> memory(rows, p, plan);
    T *tile = memory.tile, *z = memory.scratch;
    if (p.attends)
        add_attention<H>(rows, tile, z, memory.stages, p, plan, [&] { rows.load(tile, b.source); });
    const int chunks = ceil_div(p.hidden, H::kUnits);
    const auto fetch = [&](int i, char* stage) { fetch_units<H>(stage, i % chunks * H::kUnits, p); };
    Stream stages(memory.stages, plan.mlp_stage_bytes, 2 * chunks, fetch);
    if (!p.attends) rows.load(tile, b.source);
    __syncwarp();
    const float inverse = rows.normalize(tile, z);
    rows.store_own(z, b.z);
    float sums[2 * H::kDepth][4];
    run_mlp<H>(sums, typename H::BackwardLeft(z, p), stages, p);
    rows.load(tile, b.grad);
    const float kept[2] = {rows.kept(p.drop_mlp, rows.place(sum_row(0))),
                           rows.kept(p.drop_mlp, rows.place(sum_row(1)))};
    for_pairs<T>(sums, p.channels, [&](int half, int column, Pair<T> change) {
        T* place = tile + sum_row(half) * p.pitch() + column;
        const auto bias = Pair<T>::load(static_cast<const T*>(p.mlp_out_bias) + column),
                   grad = Pair<T>::load(place);
        Pair<T>{relu6_moves(change.low + bias.low) ? kept[half] * grad.low : 0.0f,
                relu6_moves(change.high + bias.high) ? kept[half] * grad.high : 0.0f}
            .store(place);
    });
    rows.store_own(tile, b.branch);
    run_mlp_bwd<H>(sums, Lying<T>(z, p), Lying<T>(tile, p), stages, rows, b, p);
    rows.load(tile, b.grad);
    normalize_bwd<H>(sums, z, tile, inverse, 1.0f, p);
    rows.store_own(tile, b.sum_grad);
}

// Keys, values, queries and the mixture's gradient of one head, for all rows of the block.
template <typename H>
struct HeadArrays {
    using T = typename H::Number;
    T *key, *value, *query, *mixture_grad;
    Statistics* statistics;

    __device__ HeadArrays(char* memory, int rows) {
        const int size = rows * H::kHeadPitch;
        key = reinterpret_cast<T*>(memory), value = key + size, query = value + size;
        mixture_grad = query + size, statistics = reinterpret_cast<Statistics*>(mixture_grad + size);
    }
    __device__ __forceinline__ T* of(int which) const { return key + which * (value - key); }
};

// One head, once its arrays are filled.
template <typename H>
__device__ __forceinline__ void attend_bwd(const Rows<H>& rows, const HeadArrays<H>& arrays,
                                           const BackwardAttention& b, const Problem& p, const Plan& plan,
                                           int head) {
    using T = typename H::Number;
    constexpr int kHead = H::kHead, kPitch = H::kHeadPitch;
    const Seen seen = rows.seen();
    const int width = p.head_width();
    const bool there[2] = {rows.place(sum_row(0)) >= 0, rows.place(sum_row(1)) >= 0};
    const float scale = p.scale(), plain_scale = 1.0f / std::sqrt(float(width));
    const int own = rows.first * kPitch;
    T* mixtures = static_cast<T*>(b.mixture) + rows.own_row * p.channels + head * width;
    T* grads = static_cast<T*>(b.heads_grad) + rows.own_row * 3 * p.channels + head * width;
    const auto store = [&](const float (&sums)[kHead / 8][4], int which, float factor) {
        for_pairs<T>(sums, width, [&](int half, int column, Pair<T> pair) {
            if (there[half])
                Pair<T>{factor * pair.low, factor * pair.high}.store(
                    grads + (sum_row(half) * 3 + which) * p.channels + column);
        });
    };
    {
        Head<kHead> query, mixture_grad;
        query.load(arrays.query + own), mixture_grad.load(arrays.mixture_grad + own);
        Statistics statistics[2] = {};
        {
            Mixture<T, kHead> mixture;
            for (int key = rows.start(); key < rows.end(plan); key += kKeyStep)
                mixture.template add<kKeyStep>(
                    query, arrays.key + key * kPitch, arrays.value + key * kPitch, scale,
                    [&](int half, int column) { return seen(half, key + column); });
            mixture.finish();
            for_pairs<T>(mixture.mixed, width, [&](int half, int column, Pair<T> mixed) {
                const auto grad = Pair<T>::load(arrays.mixture_grad + own + sum_row(half) * kPitch + column);
                statistics[half].delta += mixed.low * grad.low + mixed.high * grad.high;
                if (there[half]) mixed.store(mixtures + sum_row(half) * p.channels + column);
            });
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                statistics[half].delta = quad_sum(statistics[half].delta);
                statistics[half].log_sum = mixture.log_sum(half);
                if (threadIdx.x % 4 == 0) arrays.statistics[rows.first + sum_row(half)] = statistics[half];
            }
            __syncwarp();  // products follow
        }
        float query_grad[kHead / 8][4] = {};
        for (int key = rows.start(); key < rows.end(plan); key += kKeyStep)
            add_query_grad<T, kHead, kKeyStep>(
                query_grad, query, mixture_grad, arrays.key + key * kPitch, arrays.value + key * kPitch,
                scale, statistics, [&](int half, int column) { return seen(half, key + column); });
        store(query_grad, kQuery, plain_scale);
    }
    __syncthreads();
    Head<kHead> key, value;
    key.load(arrays.key + own), value.load(arrays.value + own);
    float key_grad[kHead / 8][4] = {}, value_grad[kHead / 8][4] = {};
    for (int query = rows.start(); query < rows.end(plan); query += kKeyStep)
        add_key_grads<T, kHead, kKeyStep>(
            key_grad, value_grad, key, value, arrays.query + query * kPitch,
            arrays.mixture_grad + query * kPitch, scale,
            [&](int column) { return arrays.statistics[query + column]; },
            [&](int half, int column) { return seen(half, query + column); });
    store(key_grad, kKey, plain_scale), store(value_grad, kValue, 1.0f);
}

// Grid as of the forward kernel.
template <typename H>
__global__ void __launch_bounds__(H::kThreads, H::kBlocks)
    class_attention_bwd_attention_kernel(Problem p, BackwardAttention b, Plan plan) {
    using T = typename H::Number;
    constexpr int kOfHead = 4 * H::kHeadStages;
    const Rows<H> rows(p, plan);
    const Memory<H> memory(rows, p, plan);
    T *tile = memory.tile, *z = memory.scratch;
    const HeadArrays<H> arrays(memory.stages + 2 * plan.stage_bytes, plan.rows());
    const int of_inputs = b.x_grad ? ceil_div(p.channels, H::kWeightRows) : 0;
    const auto fetch = [&](int i, char* stage) {
        const bool of_head = i < p.heads * kOfHead;
        if (!of_head) i -= p.heads * kOfHead;
        const int which = of_head ? i % kOfHead / H::kHeadStages : i / of_inputs;
        const void* weight = which == kMixtureGrad ? b.out_weight_transposed : p.head_weight(which);
        if (of_head) return fetch_head<H>(stage, weight, i / kOfHead, i % H::kHeadStages, p);
        const int first = i % of_inputs * H::kWeightRows;
        fetch_weight<H>(stage, weight, first, p.channels - first, p);
    };
    Stream stages(memory.stages, plan.stage_bytes, p.heads * kOfHead + 3 * of_inputs, fetch);
    rows.load(tile, b.pooled);
    const float inverse = rows.normalize(tile, z);
    rows.store_own(z, b.z);
    rows.load_own(tile, b.sum_grad, p.channels);
    const int places[2] = {rows.place(sum_row(0)), rows.place(sum_row(1))};
    if (p.drop_attention) {
        for (int row = 0; row < kRows; ++row) {
            typename Rows<H>::Numbers grad;
            grad.load(tile + row * p.pitch(), p.channels);
            grad.scale(rows.kept(p.drop_attention, rows.place(row)));
            grad.store(tile + row * p.pitch(), p.channels);
        }
        rows.store_own(tile, b.branch);
    }
    for (int head = 0; head < p.heads; ++head) {
#pragma unroll 1
        for (int which = kKey; which <= kMixtureGrad; ++which) {
            float sums[H::kHead / 8][4];
            if (which != kMixtureGrad) {
                project_head<H>(sums, Lying<T>(z, p), stages, rows, places, which, head);
            } else {
                project_head<H>(sums, Lying<T>(tile, p), stages, p);
            }
            store_head<H>(arrays.of(which) + rows.first * H::kHeadPitch, sums);
        }
        __syncwarp();  // what comes from other warps has been there since the last stage came
        attend_bwd<H>(rows, arrays, b, p, plan, head);
    }
    if (!b.x_grad) return;
    float dz[2 * H::kDepth][4];
    clear(dz);
    for (int which = 0; which < 3; ++which) {
        rows.load_own(tile, static_cast<const T*>(b.heads_grad) + which * p.channels, 3 * p.channels);
        for (int first = 0; first < p.channels; first += H::kWeightRows) {
            const T* weight = stages.template next<T>();
#pragma unroll
            for (int k = 0; k < H::kWeightRows; k += 16) {
                if (first + k >= p.channels) continue;
                uint32_t a[4];
                load_left(a, tile + first + k, p.pitch());
                multiply<T, 2 * H::kDepth, true>(dz, a, weight + k * p.pitch(), p.pitch(), p.channels);
            }
        }
        __syncwarp();
    }
    rows.load_own(tile, b.sum_grad, p.channels);
    normalize_bwd<H>(dz, z, tile, inverse, 0.25f, p);
    rows.store_cells(tile, b.x_grad, b.in_height, b.in_width);
}

// ---- launches; all of them need at least one row

// Why kernels cannot take these sizes; null when they can.
inline const char* unsupported(int channels, int heads, int hidden) {
    if (const char* reason = errseg::unsupported(channels, heads)) return reason;
    return hidden <= 0 || hidden % 8 ? "hidden units in multiples of 8" : nullptr;
}

// Calls `body(How{})` with what the sizes need.
template <typename Body>
cudaError_t visit(const Problem& p, const Body& body) {
    return visit_type(p.type, [&](auto number) {
        using T = decltype(number);
        return p.channels <= 128 && p.head_width() <= 32 ? body(How<T, 8, 32>{}) : body(How<T, 16, 64>{});
    });
}

// Pixels [first, first + count), `sizes` forward or backward.
template <typename H, typename Kernel, typename Sizes>
cudaError_t launch_rows(Kernel kernel, const Problem& p, const Sizes& sizes, int first, int count, int arrays,
                        const Device& device, cudaStream_t stream) {
    const Plan plan = Plan::make<H>(p, first, count, arrays, device);
    if (!plan.pixels) return cudaErrorInvalidValue;
    return launch(kernel, plan.blocks(), plan.warps * kWarpSize, plan.bytes, stream, p, sizes, plan);
}

inline cudaError_t forward(const Problem& p, const Forward& f, const Device& device, cudaStream_t stream) {
    return visit(p, [&](auto how) {
        using H = decltype(how);
        return launch_rows<H>(class_attention_fwd_kernel<H>, p, f, 0, p.batch * p.area(), kForwardArrays,
                              device, stream);
    });
}

inline cudaError_t backward_mlp(const Problem& p, const BackwardMLP& b, int first, int count,
                                const Device& device, cudaStream_t stream) {
    return visit(p, [&](auto how) {
        using H = decltype(how);
        return launch_rows<H>(class_attention_bwd_mlp_kernel<H>, p, b, first, count, kForwardArrays, device,
                              stream);
    });
}

inline cudaError_t backward_attention(const Problem& p, const BackwardAttention& b, int first, int count,
                                      const Device& device, cudaStream_t stream) {
    return visit(p, [&](auto how) {
        using H = decltype(how);
        return launch_rows<H>(class_attention_bwd_attention_kernel<H>, p, b, first, count, kBackwardArrays,
                              device, stream);
    });
}

// How many classes the kernels above can take.
inline int most_classes(Problem p, const Device& device) {
    int most = 0;
    visit(p, [&](auto how) {
        using H = decltype(how);
        for (int rows = kRows; rows <= H::kWarps * kRows; rows += kRows) {
            p.num_classes = rows;
            const bool fits = Plan::make<H>(p, 0, 1, kForwardArrays, device).pixels &&
                              Plan::make<H>(p, 0, 1, kBackwardArrays, device).pixels;
            if (fits) most = rows;
        }
        return cudaSuccess;
    });
    return most;
}

}  // namespace errseg::class_attention
