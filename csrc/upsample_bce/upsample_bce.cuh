// The training loss over the selected classes and its gradient, in one pass over the logits.
//
// A block owns a rectangle of low-resolution cells and walks over every output that touches one of them, for
// some classes, 64 outputs wide. A thread goes down one column of outputs: it keeps the two rows of logits
// above and below (mixed horizontally), evaluates sigmoid and cost, and gathers d loss/d logit vertically
// into two registers that move on with the rows. What a row collected goes to shared memory, from where every
// cell gathers its columns in ascending order. So the gradient has one writer per cell and one order of
// summation; outputs on the rim are evaluated by two blocks, and counted by the one that owns their upper
// left cell.
//
// A pixel is missed when its class was not selected. Selected classes being distinct, the number of missed
// pixels is the number of valid ones minus the number of (pixel, class) pairs that agree, so no block needs
// to see all classes.
#pragma once

#include "common/bilinear.cuh"
#include "common/device.cuh"

namespace errseg::upsample_bce {

constexpr int kColumns = 64;  // outputs that a block walks down at a time
constexpr int kLanes = 4;     // classes that it treats at a time
constexpr int kClasses = 8;   // classes per block
constexpr int kThreads = kColumns * kLanes;
constexpr int kWarps = kThreads / kWarpSize;
// Blocks that a multiprocessor shall hold: left to itself, ptxas may save registers until it spills.
template <typename T>
constexpr int kBlocks = sizeof(accumulator_t<T>) == sizeof(double) ? 2 : 3;
constexpr int kRows = 72;  // rows of targets in shared memory
constexpr int kMostCellsX = 64, kMostCellsY = 16;
constexpr int kPitch = kColumns + 1;  // against bank conflicts in the gather
constexpr int kIgnored = INT_MIN;
constexpr double kMissedCost = 100;  // softplus of minus the logit -100 that an unselected class stands for

// Integers of any width and sign.
struct Integers {
    const void* data;
    int bytes;
    bool is_signed;

    __device__ __forceinline__ int64_t operator[](size_t i) const {
        switch (bytes) {
            case 1:
                return is_signed ? int64_t(static_cast<const int8_t*>(data)[i])
                                 : static_cast<const uint8_t*>(data)[i];
            case 2:
                return is_signed ? int64_t(static_cast<const int16_t*>(data)[i])
                                 : static_cast<const uint16_t*>(data)[i];
            case 4:
                return is_signed ? int64_t(static_cast<const int32_t*>(data)[i])
                                 : static_cast<const uint32_t*>(data)[i];
            default:
                return static_cast<const int64_t*>(data)[i];
        }
    }
};

// What one block adds to the loss.
struct Share {
    double cost;          // of the selected classes
    long long agreeing;   // pairs of pixel and selected class that agree
    long long num_valid;  // pixels that show a class of the vocabulary
};

template <typename T>
struct Problem {
    using S = accumulator_t<T>;
    const T* logits;                // [batch, classes, y.in, x.in]
    const int64_t* class_ids;       // [batch, classes], distinct
    Integers target;                // [batch, y.out, x.out]
    S* loss;                        // scalar
    S* gradient;                    // [batch, classes, y.in, x.in], or null
    Share* shares;                  // [num_blocks(...)]
    unsigned long long* num_valid;  // zero on entry; only read and written when ignored pixels are excluded
    int batch, classes;
    int64_t vocabulary_size, ignore_index;
    bool exclude_ignored;
    BilinearAxis<S> y, x;
    int cells_y, cells_x;  // per block

    Problem(BilinearAxis<S> y, BilinearAxis<S> x) : y(y), x(x) {
        // (cells + 1) / scale outputs touch a row of cells: no more than a block is wide, where that is
        // possible.
        cells_x = std::clamp(static_cast<int>(kColumns * x.scale + S(0.001)) - 1, 1, kMostCellsX);
        cells_y = std::clamp(static_cast<int>(kColumns * y.scale + S(0.001)), 1, kMostCellsY);
    }

    dim3 grid() const {
        return dim3(ceil_div(x.in, cells_x), ceil_div(y.in, cells_y),
                    batch * std::max(1, ceil_div(classes, kClasses)));
    }
    size_t num_blocks() const { return size_t(grid().x) * grid().y * grid().z; }

    // The class at a pixel of the batch, or kIgnored.
    __device__ __forceinline__ int label(size_t pixel) const {
        const int64_t value = target[pixel];
        const bool valid = value >= 0 && value < vocabulary_size && value != ignore_index;
        return valid ? static_cast<int>(value) : kIgnored;
    }

    // What the sum over pixels and classes is divided by.
    __host__ __device__ __forceinline__ double divisor(long long valid) const {
        const double pixels = exclude_ignored ? double(valid) : double(batch) * y.out * x.out;
        return (pixels > 1 ? pixels : 1.0) * double(vocabulary_size);
    }
};

// A thread on its way down one column of outputs for one class: the logits of the two rows around it, and
// what the outputs between these rows send back to them.
template <typename T, typename S>
struct Walk {
    const T* logits;  // [in, width]
    int in, width;
    Tap<S> column;
    S* gathered;  // a column of [num_cells][kPitch]
    int first_cell, num_cells;
    int at = -1;
    S top = 0, bottom = 0, to_top = 0, to_bottom = 0;

    __device__ __forceinline__ S across(int row) const {
        const T* values = logits + size_t(row) * width;
        return column.mix(widen(values[column.low]), widen(values[column.high]));
    }

    __device__ __forceinline__ void store(int row, S value) const {
        const int cell = row - first_cell;
        if (cell >= 0 && cell < num_cells) gathered[cell * kPitch] = value;
    }

    __device__ __forceinline__ void store_both() const {
        if (at < 0) return;
        const bool last = at == in - 1;  // above and below are the same row
        store(at, last ? to_top + to_bottom : to_top);
        if (!last) store(at + 1, to_bottom);
    }

    __device__ __forceinline__ void move_to(const Tap<S>& row) {
        if (at >= 0 && row.low == at + 1) {
            store(at, to_top);
            top = bottom, to_top = to_bottom;
        } else {
            store_both();
            top = across(row.low), to_top = 0;
        }
        bottom = across(row.high), to_bottom = 0;
        at = row.low;
    }
};

// The sum over the block, the same on every thread and in every run.
template <typename V>
__device__ __forceinline__ V block_sum(V value, V (&scratch)[kWarps]) {
    value = warp_sum(value);
    if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    V total = 0;
    for (int w = 0; w < kWarps; ++w) total += scratch[w];
    return total;
}

__device__ __forceinline__ Share block_sum(const Share& share) {
    __shared__ double costs[kWarps];
    __shared__ long long agreeing[kWarps], num_valid[kWarps];
    return {block_sum(share.cost, costs), block_sum(share.agreeing, agreeing),
            block_sum(share.num_valid, num_valid)};
}

// Valid pixels of the whole batch, for the mean that leaves the others out. Integer sums know no order.
template <typename T>
__global__ void __launch_bounds__(kThreads) upsample_bce_count_kernel(Problem<T> p) {
    __shared__ int scratch[kWarps];
    const size_t pixels = size_t(p.batch) * p.y.out * p.x.out;
    int valid = 0;
    for (size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x; i < pixels;
         i += size_t(gridDim.x) * kThreads)
        valid += p.label(i) != kIgnored;
    const int total = block_sum(valid, scratch);
    if (threadIdx.x == 0) atomicAdd(p.num_valid, static_cast<unsigned long long>(total));
}

// Dynamic shared memory of the main kernel.
template <typename S>
struct Shared {
    S* gathered;  // [kLanes][cells_y][kPitch], per class and row of cells what its outputs sent up and down
    S* weights;   // [kColumns], share of the right hand cell
    int* labels;  // [kRows][kColumns]
    int* starts;  // [cells_x + 2], first output of the cell before the block's first, of the first, ...

    static size_t bytes(int cells_y, int cells_x) {
        const size_t numbers = size_t(kLanes) * cells_y * kPitch + kColumns;
        return numbers * sizeof(S) + (size_t(kRows) * kColumns + cells_x + 2) * sizeof(int);
    }

    __device__ Shared(char* memory, int cells_y)
        : gathered(reinterpret_cast<S*>(memory)),
          weights(gathered + kLanes * cells_y * kPitch),
          labels(reinterpret_cast<int*>(weights + kColumns)),
          starts(labels + kRows * kColumns) {}
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) upsample_bce_kernel(Problem<T> p) {
    using S = accumulator_t<T>;
    const Shared<S> shared(dynamic_shared(), p.cells_y);
    const int lane = threadIdx.x / kColumns, place = threadIdx.x % kColumns;
    const int first_x = blockIdx.x * p.cells_x, first_y = blockIdx.y * p.cells_y;
    const int groups = gridDim.z / p.batch, image = blockIdx.z / groups,
              first_class = blockIdx.z % groups * kClasses;
    const bool training = p.gradient != nullptr;

    for (int j = threadIdx.x; j < p.cells_x + 2; j += kThreads)
        shared.starts[j] = p.x.first_output(first_x - 1 + j);
    __syncthreads();
    // The loss counts the outputs from `own` on; those on the rim before them only matter to the gradient.
    const int own_row = p.y.first_output(first_y), own_column = shared.starts[1];
    const int row_begin = training ? p.y.first_output(first_y - 1) : own_row;
    const int row_end = p.y.first_output(first_y + p.cells_y);
    const int column_begin = training ? shared.starts[0] : own_column,
              column_end = shared.starts[p.cells_x + 1];
    const bool labels_fit = row_end - row_begin <= kRows && column_end - column_begin <= kColumns;
    const S scale =
        S(1.0 / p.divisor(p.exclude_ignored && training ? static_cast<long long>(*p.num_valid) : 0));

    Share share = {0, 0, 0};
    for (int group = 0; group < kClasses && (group == 0 || first_class + group < p.classes);
         group += kLanes) {
        const int k = first_class + group + lane;
        const bool active = k < p.classes;
        const size_t map = size_t(image) * p.classes + (active ? k : 0);
        const int id = active ? static_cast<int>(p.class_ids[map]) : kIgnored;

        for (int left = column_begin; left < column_end; left += kColumns) {
            const int column = left + place;
            const bool inside = column < column_end;
            Walk<T, S> walk;
            walk.logits = p.logits + map * p.y.in * p.x.in;
            walk.in = p.y.in, walk.width = p.x.in;
            walk.column = p.x.tap(inside ? column : column_end - 1);
            walk.gathered = shared.gathered + lane * p.cells_y * kPitch + place;
            walk.first_cell = first_y, walk.num_cells = p.cells_y;
            if (lane == 0) shared.weights[place] = walk.column.weight;
            for (int i = 0; i < p.cells_y; ++i) walk.gathered[i * kPitch] = 0;

            for (int top = row_begin; top < row_end; top += kRows) {
                const int rows = min(kRows, row_end - top);
                if (group == 0 || !labels_fit) {
                    __syncthreads();
                    for (int r = lane; r < rows && inside; r += kLanes) {
                        const int row = top + r;
                        const int label = p.label((size_t(image) * p.y.out + row) * p.x.out + column);
                        shared.labels[r * kColumns + place] = label;
                        if (group == 0 && first_class == 0 && row >= own_row && column >= own_column)
                            share.num_valid += label != kIgnored;
                    }
                    __syncthreads();
                }
                if (!active || !inside) continue;
                S cost = 0;
                int agreeing = 0;
                for (int r = 0; r < rows; ++r) {
                    const Tap<S> tap = p.y.tap(top + r);
                    if (tap.low != walk.at) walk.move_to(tap);
                    const int label = shared.labels[r * kColumns + place];
                    if (label == kIgnored && p.exclude_ignored) continue;
                    const bool positive = label == id;
                    // With z pointing away from the target: cost softplus(z), slope sigmoid(z), both without
                    // cancellation.
                    const S x = tap.mix(walk.top, walk.bottom), z = positive ? -x : x;
                    const S e = std::exp(-std::abs(z));
                    const S slope = (z >= 0 ? S(1) : e) / (S(1) + e), d = positive ? -slope : slope;
                    walk.to_top += (S(1) - tap.weight) * d;
                    walk.to_bottom += tap.weight * d;
                    if (top + r >= own_row && column >= own_column) {
                        cost += (z > 0 ? z : S(0)) + std::log1p(e);
                        agreeing += positive;
                    }
                }
                share.cost += cost;
                share.agreeing += agreeing;
            }
            if (!training) continue;

            if (active && inside) walk.store_both();
            __syncthreads();
            for (int cell = place; active && cell < p.cells_y * p.cells_x; cell += kColumns) {
                const int i = cell / p.cells_x, j = cell - i * p.cells_x, y = first_y + i, x = first_x + j;
                if (y >= p.y.in || x >= p.x.in) continue;
                const S* gathered = shared.gathered + (lane * p.cells_y + i) * kPitch;
                const int begin = max(shared.starts[j] - left, 0), middle = shared.starts[j + 1] - left;
                const int end = min(shared.starts[j + 2] - left, kColumns);
                S sum = 0;
                for (int o = begin; o < end; ++o) {
                    const S right = shared.weights[o];
                    sum += gathered[o] * (o < middle ? right : x == p.x.in - 1 ? S(1) : S(1) - right);
                }
                S* gradient = p.gradient + (map * p.y.in + y) * p.x.in + x;
                *gradient = left == column_begin ? sum * scale : *gradient + sum * scale;
            }
            __syncthreads();
        }
    }

    share = block_sum(share);
    const size_t block = (size_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) p.shares[block] = share;
}

// One block adds up all shares in one order.
template <typename T>
__global__ void __launch_bounds__(kThreads) upsample_bce_loss_kernel(Problem<T> p, int num_shares) {
    Share sum = {0, 0, 0};
    for (int i = threadIdx.x; i < num_shares; i += kThreads) {
        const Share share = p.shares[i];
        sum.cost += share.cost, sum.agreeing += share.agreeing, sum.num_valid += share.num_valid;
    }
    sum = block_sum(sum);
    const double missed = double(sum.num_valid - sum.agreeing);
    if (threadIdx.x == 0)
        *p.loss = static_cast<accumulator_t<T>>((sum.cost + kMissedCost * missed) / p.divisor(sum.num_valid));
}

// Needs num_blocks() below 2^31, grid().y and grid().z below 2^16.
template <typename T>
cudaError_t run(const Problem<T>& p, cudaStream_t stream) {
    using S = accumulator_t<T>;
    cudaError_t error = cudaSuccess;
    if (p.batch > 0) {
        if (p.exclude_ignored && p.gradient) {
            const size_t pixels = size_t(p.batch) * p.y.out * p.x.out;
            const int blocks = std::min<size_t>(1024, ceil_div<size_t>(pixels, kThreads));
            error = launch(upsample_bce_count_kernel<T>, blocks, kThreads, 0, stream, p);
            if (error != cudaSuccess) return error;
        }
        const size_t bytes = Shared<S>::bytes(p.cells_y, p.cells_x);
        error = launch(upsample_bce_kernel<T>, p.grid(), kThreads, bytes, stream, p);
        if (error != cudaSuccess) return error;
    }
    const int num_shares = p.batch > 0 ? int(p.num_blocks()) : 0;
    return launch(upsample_bce_loss_kernel<T>, 1, kThreads, 0, stream, p, num_shares);
}

}  // namespace errseg::upsample_bce
