// Sigmoid at low resolution, bilinear, first maximum over the classes: labels and scores, nothing between
// them.
//
// A block makes 32 x 32 outputs. The probabilities that they need, about 10 x 10 per class at scale 4, go
// through shared memory once, some classes at a time; each thread then walks down four outputs of one column
// and keeps the row of horizontal mixtures that neighbours share, so that an output costs about 1.5 shared
// loads per class.
#pragma once

#include "common/bilinear.cuh"
#include "common/device.cuh"

namespace errseg::upsample_argmax {

constexpr int kTile = 32;  // outputs per block and axis
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Blocks that a multiprocessor shall hold: left to itself, ptxas may save registers until it spills.
template <typename T>
constexpr int kBlocks = sizeof(accumulator_t<T>) == sizeof(double) ? 2 : 3;
constexpr int kRows = kTile / kWarps;    // outputs per thread
constexpr size_t kTileBytes = 40 << 10;  // probabilities held at a time: five blocks fit a multiprocessor

template <typename T>
struct Problem {
    using S = accumulator_t<T>;
    const T* logits;           // [batch, classes, y.in, x.in]
    const int64_t* class_ids;  // [batch, classes]
    int32_t* labels;           // [batch, y.out, x.out]
    S* scores;                 // [batch, y.out, x.out], or null: not wanted
    int batch, classes;
    BilinearAxis<S> y, x;
};

template <typename S>
__device__ __forceinline__ S sigmoid(S v) {
    return S(1) / (S(1) + std::exp(-v));
}

// Whether the ids ascend, as class selection writes them; every thread of the block asks.
__device__ __forceinline__ bool ascending(const int64_t* ids, int classes) {
    bool ordered = true;
    for (int k = threadIdx.x; k + 1 < classes; k += blockDim.x) ordered &= ids[k] < ids[k + 1];
    return __syncthreads_and(ordered);
}

// The best class so far of one output. Classes that come in ascending order need no look at the id: the first
// of equal ones stays.
template <typename S>
struct Best {
    S score;
    int32_t id;

    template <bool kAscending>
    __device__ __forceinline__ void offer(S other, int32_t other_id) {
        if (other > score || (!kAscending && other == score && other_id < id)) score = other, id = other_id;
    }
};

// The thread's outputs: a column and kRows rows, placed relative to the block's rectangle of probabilities.
template <typename S>
struct Strip {
    Tap<S> column;
    Tap<S> rows[kRows];

    template <bool kAscending>
    __device__ __forceinline__ void scan(const S* probabilities, const int32_t* ids, int count, int cells,
                                         int pitch, Best<S> (&best)[kRows]) const {
        for (int k = 0; k < count; ++k, probabilities += cells) {
            const int32_t id = ids[k];
            const auto across = [&](int row) {
                return column.mix(probabilities[row * pitch + column.low],
                                  probabilities[row * pitch + column.high]);
            };
            int at = rows[0].low;
            S top = across(at), bottom = across(rows[0].high);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (rows[r].low != at) {  // the same way for the whole warp
                    top = rows[r].low == at + 1 ? bottom : across(rows[r].low);
                    bottom = across(rows[r].high);
                    at = rows[r].low;
                }
                best[r].template offer<kAscending>(rows[r].mix(top, bottom), id);
            }
        }
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    upsample_argmax_tile_kernel(Problem<T> p, int chunk, int most_cells) {
    using S = accumulator_t<T>;
    S* probabilities = reinterpret_cast<S*>(dynamic_shared());  // [chunk][height][width]
    int32_t* ids = reinterpret_cast<int32_t*>(probabilities + size_t(chunk) * most_cells);  // [chunk]

    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, image = blockIdx.z;
    const int64_t* class_ids = p.class_ids + size_t(image) * p.classes;
    const bool in_order = ascending(class_ids, p.classes);

    // The rectangle of inputs under the tile; outputs beyond the map repeat its last ones and are not stored.
    const int first_y = p.y.low(blockIdx.y * kTile), first_x = p.x.low(blockIdx.x * kTile);
    const int height = p.y.tap(min(int(blockIdx.y + 1) * kTile, p.y.out) - 1).high + 1 - first_y;
    const int width = p.x.tap(min(int(blockIdx.x + 1) * kTile, p.x.out) - 1).high + 1 - first_x;
    const int cells = height * width;

    const int column = blockIdx.x * kTile + lane, first_row = blockIdx.y * kTile + warp * kRows;
    Strip<S> strip;
    Best<S> best[kRows];
    strip.column = p.x.tap(min(column, p.x.out - 1));
    strip.column.low -= first_x, strip.column.high -= first_x;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        strip.rows[r] = p.y.tap(min(first_row + r, p.y.out - 1));
        strip.rows[r].low -= first_y, strip.rows[r].high -= first_y;
        best[r] = {S(-1), static_cast<int32_t>(class_ids[0])};  // any probability is more; NaN is not
    }

    const size_t plane = size_t(p.y.in) * p.x.in;
    for (int start = 0; start < p.classes; start += chunk) {
        const int count = min(chunk, p.classes - start);
        const T* logits = p.logits + (size_t(image) * p.classes + start) * plane;
        __syncthreads();
        for (int k = threadIdx.x; k < count; k += kThreads)
            ids[k] = static_cast<int32_t>(class_ids[start + k]);
        for (int cell = lane; cell < cells; cell += kWarpSize) {
            const int y = cell / width, x = cell - y * width;
            const T* source = logits + size_t(first_y + y) * p.x.in + first_x + x;
#pragma unroll 4
            for (int k = warp; k < count; k += kWarps)
                probabilities[k * cells + cell] = sigmoid(widen(source[k * plane]));
        }
        __syncthreads();
        if (in_order) {
            strip.template scan<true>(probabilities, ids, count, cells, width, best);
        } else {
            strip.template scan<false>(probabilities, ids, count, cells, width, best);
        }
    }

    if (column >= p.x.out) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        if (first_row + r >= p.y.out) break;
        const size_t at = (size_t(image) * p.y.out + first_row + r) * p.x.out + column;
        p.labels[at] = best[r].id;
        if (p.scores) p.scores[at] = best[r].score;
    }
}

// For maps that shrink so much that outputs share no inputs: every output reads its four inputs itself.
template <typename T>
__global__ void __launch_bounds__(kThreads) upsample_argmax_direct_kernel(Problem<T> p) {
    using S = accumulator_t<T>;
    const int column = blockIdx.x * kTile + threadIdx.x % kTile,
              row = blockIdx.y * kWarps + threadIdx.x / kTile;
    if (column >= p.x.out || row >= p.y.out) return;
    const int image = blockIdx.z;
    const int64_t* class_ids = p.class_ids + size_t(image) * p.classes;
    const Tap<S> x = p.x.tap(column), y = p.y.tap(row);
    const T* top = p.logits + (size_t(image) * p.classes * p.y.in + y.low) * p.x.in;
    const T* bottom = p.logits + (size_t(image) * p.classes * p.y.in + y.high) * p.x.in;
    const size_t plane = size_t(p.y.in) * p.x.in;
    Best<S> best = {S(-1), static_cast<int32_t>(class_ids[0])};
    for (int k = 0; k < p.classes; ++k, top += plane, bottom += plane) {
        const S above = x.mix(sigmoid(widen(top[x.low])), sigmoid(widen(top[x.high])));
        const S below = x.mix(sigmoid(widen(bottom[x.low])), sigmoid(widen(bottom[x.high])));
        best.template offer<false>(y.mix(above, below), static_cast<int32_t>(class_ids[k]));
    }
    const size_t at = (size_t(image) * p.y.out + row) * p.x.out + column;
    p.labels[at] = best.id;
    if (p.scores) p.scores[at] = best.score;
}

// Needs batch <= 65535 and, unless the batch is empty, at least one class.
template <typename T>
cudaError_t run(const Problem<T>& p, cudaStream_t stream) {
    using S = accumulator_t<T>;
    if (p.batch == 0) return cudaSuccess;
    const size_t cells = size_t(p.y.most_inputs(kTile)) * p.x.most_inputs(kTile);
    const size_t class_bytes = cells * sizeof(S) + sizeof(int32_t);
    const int tiles_x = ceil_div(p.x.out, kTile);
    if (class_bytes > kTileBytes) {
        const dim3 grid(tiles_x, ceil_div(p.y.out, kWarps), p.batch);
        return launch(upsample_argmax_direct_kernel<T>, grid, kThreads, 0, stream, p);
    }
    const int most = std::min<size_t>(p.classes, kTileBytes / class_bytes);
    const int chunk = ceil_div(p.classes, ceil_div(p.classes, most));  // chunks of one size
    const dim3 grid(tiles_x, ceil_div(p.y.out, kTile), p.batch);
    return launch(upsample_argmax_tile_kernel<T>, grid, kThreads, chunk * class_bytes, stream, p, chunk,
                  int(cells));
}

}  // namespace errseg::upsample_argmax
