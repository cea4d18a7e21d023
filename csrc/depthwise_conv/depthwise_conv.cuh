// Depthwise convolution of token-major maps, and its gradients.
//
// A block walks down a strip of one map, kColumns wide, in kChannels channels.
// Its rows stream through a ring in shared memory; a lane has two channels, a
// warp kOutputs columns. A thread keeps the whole window of its channels in
// registers, and the sums of the seven rows of outputs that the row at hand
// takes part in, so that a number is loaded once and used in all of them. Rows
// of sums take turns in registers, which is why the walk is unrolled seven
// steps at a time.
//
// The gradient of the input is the same convolution with the window turned
// round. The gradient of the window is the same walk with its registers in
// other roles: what was the window gathers, and instead of seven rows of sums
// there are the seven rows of incoming gradients that the row at hand meets.
// Each block writes what it gathered, and a second kernel adds that up in one
// order.
//
// Other windows than 7 x 7, float64, and pixels that cannot be copied in pieces
// of 16 bytes take plain kernels, one thread per result.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/async.cuh"
#include "common/device.cuh"
#include "common/split.cuh"

namespace errseg::depthwise_conv {

constexpr int kSize = 7, kTaps = kSize * kSize, kHalo = kSize / 2;
constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kOutputs = 2;                    // columns of a warp
constexpr int kColumns = kWarps * kOutputs;    // of a block
constexpr int kPixels = kColumns + kSize - 1;  // of a row with its halo
constexpr int kChannels = 2 * kWarpSize;       // of a block
constexpr int kAhead = 3;                      // rows that are under way to shared memory
constexpr int kBlocks = 3, kGatherBlocks = 2;  // that a multiprocessor shall hold: up to 168, 255 registers
constexpr int kEnoughBlocks = 384;             // maps are cut into strips until there are about that many
constexpr int kFewestRows = 8;                 // of a strip, which takes six steps more
constexpr int kPlainThreads = 256, kPlainRows = 16;

// ---- arguments

// Numbers of any floating type, read and written one by one.
struct Numbers {
    void* data = nullptr;
    Number type = Number::kFloat32;

    template <typename S>
    __device__ __forceinline__ S read(size_t i) const {
        switch (type) {
            case Number::kFloat32:
                return S(static_cast<const float*>(data)[i]);
            case Number::kFloat64:
                return S(static_cast<const double*>(data)[i]);
            case Number::kFloat16:
                return S(widen(static_cast<const half*>(data)[i]));
            default:
                return S(widen(static_cast<const bf16*>(data)[i]));
        }
    }
    template <typename S>
    __device__ __forceinline__ void write(size_t i, S value) const {
        switch (type) {
            case Number::kFloat32:
                static_cast<float*>(data)[i] = static_cast<float>(value);
                break;
            case Number::kFloat64:
                static_cast<double*>(data)[i] = static_cast<double>(value);
                break;
            case Number::kFloat16:
                static_cast<half*>(data)[i] = narrow<half>(static_cast<float>(value));
                break;
            default:
                static_cast<bf16*>(data)[i] = narrow<bf16>(static_cast<float>(value));
        }
    }
};

// [count, height, width, channels].
struct Maps {
    int count, height, width, channels;
    int pitch = width * channels;  // from row to row

    __host__ __device__ __forceinline__ size_t at(int map, int y, int x, int c) const {
        return ((size_t(map) * height + y) * width + x) * channels + c;
    }
    __host__ __device__ size_t numel() const { return size_t(count) * height * width * channels; }
    // Whether pixels can be copied in pieces of kAsyncBytes.
    template <typename T>
    bool aligned(const T* data) const {
        return channels * sizeof(T) % kAsyncBytes == 0 &&
               reinterpret_cast<uintptr_t>(data) % kAsyncBytes == 0;
    }
};

// How the work is cut: units (a group of maps, a strip of their rows, some of
// their columns) times blocks of channels.
struct Cut {
    int map_groups, maps;  // groups, and maps of each
    int strips, rows;      // strips, and rows of each
    int column_blocks, channel_blocks;

    __host__ __device__ __forceinline__ int64_t units() const {
        return int64_t(map_groups) * strips * column_blocks;
    }
    int64_t blocks() const { return units() * channel_blocks; }

    // For the walk.
    static Cut walk(const Maps& m, bool gathers) {
        Cut cut{m.count, 1, 1, m.height, ceil_div(m.width, kColumns), ceil_div(m.channels, kChannels)};
        const int64_t blocks = std::max<int64_t>(1, cut.blocks());
        const int most = std::max(1, m.height / kFewestRows);
        cut.rows = ceil_div(m.height, int(std::clamp<int64_t>(kEnoughBlocks / blocks, 1, most)));
        cut.strips = ceil_div(m.height, cut.rows);
        return gathers ? cut.gathering(m) : cut;
    }
    // For the plain kernel, which only gathers.
    static Cut plain(const Maps& m) {
        const Cut cut{m.count,    1, ceil_div(m.height, kPlainRows),
                      kPlainRows, 1, ceil_div(m.channels, kWarpSize)};
        return cut.gathering(m);
    }

  private:
    // With several maps to a block where there are many: what it gathers is stored.
    Cut gathering(const Maps& m) const {
        Cut cut = *this;
        cut.maps = int(std::clamp<int64_t>(cut.blocks() / (2 * kEnoughBlocks), 1, m.count));
        cut.map_groups = ceil_div(m.count, cut.maps);
        return cut;
    }
};

// out = added + scale (convolution of `in` + bias).
template <typename T>
struct Convolution {
    Maps maps;
    int size;        // k
    const T* in;     // [count, height, width, channels]
    Numbers weight;  // [channels, k, k]
    bool turned;     // the window is turned round
    Numbers bias;    // [channels], or null
    Numbers scales;  // [count], or null
    const T* added;  // like `in`, or null
    T* out;          // like `in`

    bool walks() const {
        return std::is_same_v<accumulator_t<T>, float> && size == kSize && maps.aligned(in) &&
               maps.aligned(added) && maps.aligned(out);
    }
};

// Gradients of window and bias.
template <typename T>
struct Gathering {
    Maps maps;
    int size;
    const T* in;                 // [count, height, width, channels]
    const T* grad;               // like `in`: of the result
    Numbers scales;              // [count], or null
    accumulator_t<T>* gathered;  // [cut().units(), k k + 1, channels]: window, bias
    Numbers weight_grad;         // [channels, k, k], or null
    Numbers bias_grad;           // [channels], or null

    bool walks() const {
        return std::is_same_v<accumulator_t<T>, float> && size == kSize && maps.aligned(in) &&
               maps.aligned(grad);
    }
    Cut cut() const { return walks() ? Cut::walk(maps, true) : Cut::plain(maps); }
};

// ---- two neighbouring channels

// Two numbers as they lie in memory, in as many registers as they fill.
template <typename T>
using Packed = std::conditional_t<sizeof(T) == 2, uint32_t, float2>;

__device__ __forceinline__ float2 zero() {
    return {0.f, 0.f};
}
template <typename T>
__device__ __forceinline__ float2 unpack(Packed<T> v) {
    if constexpr (std::is_same_v<T, bf16>) {
        return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
    } else if constexpr (std::is_same_v<T, half>) {
        half pair[2];
        memcpy(pair, &v, sizeof v);
        return {widen(pair[0]), widen(pair[1])};
    } else {
        return v;
    }
}
template <typename T>
__device__ __forceinline__ Packed<T> pack(const float2& v) {
    const T pair[2] = {narrow<T>(v.x), narrow<T>(v.y)};
    Packed<T> packed;
    memcpy(&packed, pair, sizeof packed);
    return packed;
}
template <typename T>
__device__ __forceinline__ Packed<T> load_pair(const T* from) {
    return *reinterpret_cast<const Packed<T>*>(from);
}
template <typename T>
__device__ __forceinline__ void store_pair(T* to, const float2& v) {
    *reinterpret_cast<Packed<T>*>(to) = pack<T>(v);
}
__device__ __forceinline__ void multiply_add(float2& sum, const float2& a, const float2& b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    // One instruction for both.
    uint64_t packed_sum, packed_a, packed_b;
    memcpy(&packed_sum, &sum, sizeof sum), memcpy(&packed_a, &a, sizeof a), memcpy(&packed_b, &b, sizeof b);
    asm("fma.rn.f32x2 %0, %1, %2, %0;" : "+l"(packed_sum) : "l"(packed_a), "l"(packed_b));
    memcpy(&sum, &packed_sum, sizeof sum);
#else
    sum.x += a.x * b.x;
    sum.y += a.y * b.y;
#endif
}

// Where a block and a thread are.
struct Place {
    int unit, map, top, bottom;  // first map and row
    int left, column;            // first column of the block, of the warp
    int first_channel, channel;  // of the block, of the lane

    __device__ Place(const Maps& m, const Cut& cut) {
        int64_t rest = blockIdx.x;
        first_channel = int(rest % cut.channel_blocks) * kChannels;
        unit = int(rest / cut.channel_blocks), rest = unit;
        left = int(rest % cut.column_blocks) * kColumns, rest /= cut.column_blocks;
        top = int(rest % cut.strips) * cut.rows, bottom = min(top + cut.rows, m.height);
        map = int(rest / cut.strips) * cut.maps;
        column = left + int(threadIdx.x) / kWarpSize * kOutputs;
        channel = first_channel + 2 * (int(threadIdx.x) % kWarpSize);
    }
};

// Rows of a map on their way through shared memory,
// [kSize][kPixels][kChannels], zero beside the map.
template <typename T>
struct Stream {
    static constexpr size_t kBytes = size_t(kSize) * kPixels * kChannels * sizeof(T);
    static constexpr int kVector = kAsyncBytes / sizeof(T), kVectors = kChannels / kVector;
    static constexpr int kRowPixels = kThreads / kVectors;  // that the threads copy at a time

    const T* from;  // what the thread copies of the next row
    T* to;          // where, in the first row of the ring
    const T* read;  // what its outputs see of that row
    bool wanted[ceil_div(kPixels, kRowPixels)], inside[ceil_div(kPixels, kRowPixels)];

    __device__ __forceinline__ Stream(const T* data, const Maps& m, const Place& place, int map) {
        const int pixel = int(threadIdx.x) / kVectors, c = int(threadIdx.x) % kVectors * kVector;
        T* ring = reinterpret_cast<T*>(dynamic_shared());
        from = data + (int64_t(m.at(map, 0, 0, place.first_channel + c)) +
                       (int64_t(place.top - kHalo) * m.width + place.left - kHalo + pixel) * m.channels);
        to = ring + pixel * kChannels + c;
        read = ring + (place.column - place.left) * kChannels + (place.channel - place.first_channel);
#pragma unroll
        for (int i = 0; i < ceil_div(kPixels, kRowPixels); ++i) {
            const int x = place.left - kHalo + pixel + i * kRowPixels;
            wanted[i] = pixel + i * kRowPixels < kPixels;
            inside[i] = 0 <= x && x < m.width && place.first_channel + c < m.channels;
        }
    }

    // Starts to load row `y`, the next one, into a place of the ring, unless it
    // is `end`.
    __device__ __forceinline__ void load(const Maps& m, int y, int end, int slot) {
        if (unsigned(y) < unsigned(end)) {
#pragma unroll
            for (int i = 0; i < ceil_div(kPixels, kRowPixels); ++i)
                if (wanted[i])
                    copy_async(to + (slot * kPixels + i * kRowPixels) * kChannels,
                               from + i * kRowPixels * m.channels, inside[i]);
        }
        commit_async();
        from += m.pitch;
    }

    __device__ __forceinline__ void start(const Maps& m, int y, int end) {
#pragma unroll
        for (int slot = 0; slot < kAhead; ++slot) load(m, y + slot, end, slot);
    }

    // Waits for row `y`, and lets another one come; the place that it takes was
    // last read before a barrier.
    __device__ __forceinline__ void advance(const Maps& m, int y, int end, int slot) {
        wait_async<kAhead - 1>();
        __syncthreads();
        load(m, y + kAhead, end, (slot + kAhead) % kSize);
    }

    // Pixel i of the kOutputs + kSize - 1 that the thread sees of a row.
    __device__ __forceinline__ float2 pixel(int slot, int i) const {
        return unpack<T>(load_pair(read + (slot * kPixels + i) * kChannels));
    }
};

// ---- the walk

constexpr size_t kWindowBytes = sizeof(float) * kTaps * kChannels;
constexpr size_t kSumsBytes = sizeof(float) * (kTaps + 1) * kChannels;

// The window of the thread's channels, through shared memory
// [kChannels][kTaps].
template <typename T>
__device__ __forceinline__ void load_window(const Convolution<T>& p, const Place& place, float* shared,
                                            float2 (&window)[kTaps]) {
    for (int i = threadIdx.x; i < kChannels * kTaps; i += kThreads) {
        const int c = i / kTaps, tap = i % kTaps, channel = place.first_channel + c;
        const size_t from = size_t(channel) * kTaps + (p.turned ? kTaps - 1 - tap : tap);
        shared[i] = channel < p.maps.channels ? p.weight.template read<float>(from) : 0.f;
    }
    __syncthreads();
    const float* own = shared + (place.channel - place.first_channel) * kTaps;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) window[tap] = {own[tap], own[kTaps + tap]};
    __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) depthwise_conv_kernel(Convolution<T> p, Cut cut) {
    const Place place(p.maps, cut);
    float2 window[kTaps], bias = zero();
    load_window(p, place, reinterpret_cast<float*>(dynamic_shared()), window);
    const bool has_channel = place.channel < p.maps.channels;  // and the next one, their number being even
    if (p.bias.data && has_channel)
        bias = {p.bias.template read<float>(place.channel), p.bias.template read<float>(place.channel + 1)};
    const float scale = p.scales.data ? p.scales.template read<float>(place.map) : 1.f;
    const int columns = has_channel ? p.maps.width - place.column : 0;  // of the thread's, how many there are

    // Step t brings row top - kHalo + t and completes row top + t - 2 kHalo.
    const int steps = place.bottom - place.top + 2 * kHalo, end = min(place.bottom + kHalo, p.maps.height);
    const int64_t at = int64_t(p.maps.at(place.map, place.top, place.column, place.channel)) -
                       int64_t(2 * kHalo) * p.maps.pitch;
    const T* added = (p.added ? p.added : p.out) + at;  // read if there is one
    T* out = p.out + at;
    float2 sums[kSize][kOutputs];
    Stream<T> stream(p.in, p.maps, place, place.map);
    stream.start(p.maps, place.top - kHalo, end);
    for (int first = 0; first < steps; first += kSize) {
#pragma unroll
        for (int phase = 0; phase < kSize; ++phase) {
            const int step = first + phase, row = place.top - kHalo + step;
            if (step >= steps) break;
            stream.advance(p.maps, row, end, phase);
            const bool done = step >= 2 * kHalo;
            Packed<T> addend[kOutputs];
#pragma unroll
            for (int j = 0; j < kOutputs; ++j) {
                sums[phase][j] = zero();
                if (p.added && done && j < columns) addend[j] = load_pair(added + j * p.maps.channels);
            }
            if (unsigned(row) < unsigned(end)) {
#pragma unroll
                for (int i = 0; i < kOutputs + kSize - 1; ++i) {
                    const float2 value = stream.pixel(phase, i);
#pragma unroll
                    for (int dy = 0; dy < kSize; ++dy)
#pragma unroll
                        for (int j = 0; j < kOutputs; ++j)
                            if (0 <= i - j && i - j < kSize)
                                multiply_add(sums[(phase - dy + kSize) % kSize][j],
                                             window[dy * kSize + i - j], value);
                }
            }
#pragma unroll
            for (int j = 0; j < kOutputs; ++j) {
                if (!done || j >= columns) continue;
                const float2 sum = sums[(phase + 1) % kSize][j];
                float2 value{scale * (sum.x + bias.x), scale * (sum.y + bias.y)};
                if (p.added) {
                    const float2 other = unpack<T>(addend[j]);
                    value.x += other.x, value.y += other.y;
                }
                store_pair(out + j * p.maps.channels, value);
            }
            added += p.maps.pitch, out += p.maps.pitch;
        }
    }
}

// The sums of the block's warps, one after the other, to `gathered` [k k + 1,
// channels].
__device__ __forceinline__ void store_sums(const float2 (&window)[kTaps], const float2& total,
                                           const Maps& maps, const Place& place, float* gathered) {
    float2* shared = reinterpret_cast<float2*>(dynamic_shared());  // [kTaps + 1][kWarpSize]
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    for (int turn = 0; turn < kWarps; ++turn) {
        __syncthreads();
        if (warp != turn) continue;
#pragma unroll
        for (int tap = 0; tap <= kTaps; ++tap) {
            const float2 own = tap < kTaps ? window[tap] : total;
            float2& sum = shared[tap * kWarpSize + lane];
            sum = turn == 0 ? own : float2{sum.x + own.x, sum.y + own.y};
        }
    }
    __syncthreads();
    const float* sums = reinterpret_cast<const float*>(shared);
    for (int i = threadIdx.x; i < (kTaps + 1) * kChannels; i += kThreads) {
        const int tap = i / kChannels, channel = place.first_channel + i % kChannels;
        if (channel < maps.channels) gathered[size_t(tap) * maps.channels + channel] = sums[i];
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kGatherBlocks)
    depthwise_conv_gather_kernel(Gathering<T> p, Cut cut) {
    const Place place(p.maps, cut);
    const int columns = place.channel < p.maps.channels ? p.maps.width - place.column : 0;
    float2 window[kTaps], total = zero();
#pragma unroll
    for (float2& sum : window) sum = zero();
    const int rows = place.bottom - place.top, steps = rows + 2 * kHalo;
    const int end = min(place.bottom + kHalo, p.maps.height);
    const int last_map = min(place.map + cut.maps, p.maps.count);
    for (int map = place.map; map < last_map; ++map) {
        const float scale = p.scales.data ? p.scales.template read<float>(map) : 1.f;
        const T* grad = p.grad + p.maps.at(map, place.top, place.column, place.channel);
        float2 grads[kSize][kOutputs];  // of seven rows
        Packed<T> next[kOutputs];       // of the row to come
#pragma unroll
        for (int j = 0; j < kOutputs; ++j) {
            if (j < columns) next[j] = load_pair(grad + j * p.maps.channels);
#pragma unroll
            for (int dy = 0; dy < kSize; ++dy) grads[dy][j] = zero();
        }
        Stream<T> stream(p.in, p.maps, place, map);
        __syncthreads();  // the map before is done with the ring
        stream.start(p.maps, place.top - kHalo, end);
        // Step t brings row top - kHalo + t of the input and row top + t of the
        // gradients.
        for (int first = 0; first < steps; first += kSize) {
#pragma unroll
            for (int phase = 0; phase < kSize; ++phase) {
                const int step = first + phase, row = place.top - kHalo + step;
                if (step >= steps) break;
                stream.advance(p.maps, row, end, phase);
                grad += p.maps.pitch;
#pragma unroll
                for (int j = 0; j < kOutputs; ++j) {
                    const float2 own = step < rows && j < columns ? unpack<T>(next[j]) : zero();
                    grads[phase][j] = {scale * own.x, scale * own.y};
                    total.x += grads[phase][j].x, total.y += grads[phase][j].y;
                    if (step + 1 < rows && j < columns) next[j] = load_pair(grad + j * p.maps.channels);
                }
                if (unsigned(row) >= unsigned(end)) continue;
#pragma unroll
                for (int i = 0; i < kOutputs + kSize - 1; ++i) {
                    const float2 value = stream.pixel(phase, i);
#pragma unroll
                    for (int dy = 0; dy < kSize; ++dy)
#pragma unroll
                        for (int j = 0; j < kOutputs; ++j)
                            if (0 <= i - j && i - j < kSize)
                                multiply_add(window[dy * kSize + i - j],
                                             grads[(phase - dy + kSize) % kSize][j], value);
                }
            }
        }
    }
    store_sums(window, total, p.maps, place, p.gathered + size_t(place.unit) * (kTaps + 1) * p.maps.channels);
}

// ---- plain kernels

template <typename T>
__global__ void __launch_bounds__(kPlainThreads, 4) depthwise_conv_plain_kernel(Convolution<T> p) {
    using S = accumulator_t<T>;
    const Maps& m = p.maps;
    const int halo = p.size / 2, taps = p.size * p.size;
    for (size_t i = size_t(blockIdx.x) * kPlainThreads + threadIdx.x; i < m.numel();
         i += size_t(gridDim.x) * kPlainThreads) {
        const int c = int(i % m.channels), x = int(i / m.channels % m.width);
        const int y = int(i / m.channels / m.width % m.height), map = int(i / m.at(1, 0, 0, 0));
        S sum = 0;
        for (int tap = 0; tap < taps; ++tap) {
            const int row = y + tap / p.size - halo, column = x + tap % p.size - halo;
            if (row < 0 || row >= m.height || column < 0 || column >= m.width) continue;
            const S weight = p.weight.template read<S>(size_t(c) * taps + (p.turned ? taps - 1 - tap : tap));
            sum += weight * widen(p.in[m.at(map, row, column, c)]);
        }
        if (p.bias.data) sum += p.bias.template read<S>(c);
        if (p.scales.data) sum *= p.scales.template read<S>(map);
        p.out[i] = narrow<T>(p.added ? sum + widen(p.added[i]) : sum);
    }
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads, 4)
    depthwise_conv_plain_gather_kernel(Gathering<T> p, Cut cut) {
    using S = accumulator_t<T>;
    const Maps& m = p.maps;
    const int halo = p.size / 2, taps = p.size * p.size;
    const int c = int(blockIdx.x % cut.channel_blocks) * kWarpSize + threadIdx.x % kWarpSize;
    const int unit = int(blockIdx.x / cut.channel_blocks), first_map = unit / cut.strips * cut.maps;
    const int last_map = min(first_map + cut.maps, m.count);
    const int top = unit % cut.strips * cut.rows, bottom = min(top + cut.rows, m.height);
    if (c >= m.channels) return;
    for (int tap = threadIdx.x / kWarpSize; tap <= taps; tap += kPlainThreads / kWarpSize) {
        const bool bias = tap == taps;
        const int dy = bias ? 0 : tap / p.size - halo, dx = bias ? 0 : tap % p.size - halo;
        S total = 0;
        for (int map = first_map; map < last_map; ++map) {
            S sum = 0;
            for (int y = max(top, -dy); y < min(bottom, m.height - dy); ++y)
                for (int x = max(0, -dx); x < min(m.width, m.width - dx); ++x) {
                    const S grad = widen(p.grad[m.at(map, y, x, c)]);
                    sum += bias ? grad : grad * widen(p.in[m.at(map, y + dy, x + dx, c)]);
                }
            total += p.scales.data ? p.scales.template read<S>(map) * sum : sum;
        }
        p.gathered[(size_t(unit) * (taps + 1) + tap) * m.channels + c] = total;
    }
}

// ---- the sum over all units

template <typename T>
__global__ void __launch_bounds__(kPlainThreads, 4)
    depthwise_conv_reduce_kernel(Gathering<T> p, int64_t units) {
    using S = accumulator_t<T>;
    constexpr int kRows = kPlainThreads / kWarpSize;
    __shared__ S shared[kRows][kWarpSize];
    const int row = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, taps = p.size * p.size;
    const int c = blockIdx.x * kWarpSize + lane, tap = blockIdx.y;
    S sum = 0;
    for (int64_t unit = row; unit < units && c < p.maps.channels; unit += kRows)
        sum += p.gathered[(size_t(unit) * (taps + 1) + tap) * p.maps.channels + c];
    shared[row][lane] = sum;
    __syncthreads();
    if (row != 0 || c >= p.maps.channels) return;
    for (int other = 1; other < kRows; ++other) sum += shared[other][lane];
    if (tap == taps) {
        if (p.bias_grad.data) p.bias_grad.write(c, sum);
    } else if (p.weight_grad.data) {
        p.weight_grad.write(size_t(c) * taps + tap, sum);
    }
}

// Needs at least one number, and fewer than 2^31 blocks of `Cut` and numbers of
// a row.
template <typename T>
cudaError_t run(const Convolution<T>& p, cudaStream_t stream) {
    if constexpr (sizeof(T) < sizeof(double))
        if (p.walks()) {
            const Cut cut = Cut::walk(p.maps, false);
            const size_t bytes = std::max(Stream<T>::kBytes, kWindowBytes);
            return launch(depthwise_conv_kernel<T>, dim3(cut.blocks()), kThreads, bytes, stream, p, cut);
        }
    const size_t blocks = std::min<size_t>(ceil_div<size_t>(p.maps.numel(), kPlainThreads), 1 << 20);
    return launch(depthwise_conv_plain_kernel<T>, dim3(blocks), kPlainThreads, 0, stream, p);
}

template <typename T>
cudaError_t gather(const Gathering<T>& p, const Cut& cut, cudaStream_t stream) {
    if constexpr (sizeof(T) < sizeof(double))
        if (p.walks()) {
            const size_t bytes = std::max(Stream<T>::kBytes, kSumsBytes);
            return launch(depthwise_conv_gather_kernel<T>, dim3(cut.blocks()), kThreads, bytes, stream, p,
                          cut);
        }
    return launch(depthwise_conv_plain_gather_kernel<T>, dim3(cut.blocks()), kPlainThreads, 0, stream, p,
                  cut);
}

template <typename T>
cudaError_t run(const Gathering<T>& p, cudaStream_t stream) {
    const Cut cut = p.cut();
    const cudaError_t error = gather(p, cut, stream);
    if (error != cudaSuccess) return error;
    const dim3 grid(ceil_div(p.maps.channels, kWarpSize), p.size * p.size + 1);
    return launch(depthwise_conv_reduce_kernel<T>, grid, kPlainThreads, 0, stream, p, cut.units());
}

}  // namespace errseg::depthwise_conv
