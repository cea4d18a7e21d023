// Votes of the pixels for the words: cosines on tensor cores, the best three words of every pixel in
// registers.
//
// A block takes 64 pixels and streams its slice of the words past them, 128 at a time; nothing of T x P is
// stored. What is multiplied are the embeddings as they are; the word's length divides the sum afterwards,
// and the pixel's length does not change its ranks. So 16-bit inputs need one product per pair, exact in
// float32. Wider inputs are split into three bfloat16 parts (8 + 8 + 8 bits, all of a float32) of which
// the six leading products are summed; what is left out is below 2^-26 of |pixel| |word|, less than the sum's
// own rounding.
//
// Equal words get equal scores wherever they stand: each column of a tensor-core product is summed in the
// same order, and so is each word's length. Ranks are by score, then by lowest id, so votes do not depend on
// how words are sliced.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/device.cuh"
#include "common/mma.cuh"
#include "common/split.cuh"

namespace errseg::class_votes {

constexpr int kPixels = 64;  // per block
constexpr int kWords = 128;  // at a time
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kWarpsAcross = 4;  // along the words; the other factor is along the pixels
constexpr int kWarpPixels = 32, kWarpWords = 32;
constexpr int kVector = 4;  // channels that a thread loads at once
constexpr int kRanks = 3;
constexpr float kSmallestLength = 1e-12f;
constexpr size_t kScratchBytes = 32 << 20;

static_assert(kWarpPixels * (kWarps / kWarpsAcross) == kPixels && kWarpWords * kWarpsAcross == kWords);

struct Embeddings {
    const void* data;
    Number type;
    bool aligned = false;  // to `kVector` channels, set by `run`

    template <typename T>
    __device__ __forceinline__ const T* as() const {
        return static_cast<const T*>(data);
    }

    bool is_aligned(int row_stride) const {
        const int bytes = type == Number::kFloat64 ? 8 : type == Number::kFloat32 ? 4 : 2;
        return row_stride % kVector == 0 && reinterpret_cast<uintptr_t>(data) % (kVector * bytes) == 0;
    }
};

struct Problem {
    Embeddings pixels;  // [batch, num_pixels, channels]
    Embeddings words;   // [num_words, channels], rows `word_stride` numbers apart
    int word_stride;
    int batch, channels, num_pixels, num_words;
    unsigned long long* votes;  // [batch, num_words], zero on entry
    void* scratch;              // Plan::scratch_bytes()
};

// How the work is cut: a launch takes some tiles of pixels, each with every slice of the words.
struct Plan {
    int tiles_per_image, tiles, tiles_per_launch;
    int slices, words_per_slice;

    Plan(const Problem& p, int multiprocessors) {
        tiles_per_image = ceil_div(p.num_pixels, kPixels);
        tiles = p.batch * tiles_per_image;
        const int word_tiles = ceil_div(p.num_words, kWords);
        // One wave of two blocks per multiprocessor.
        const int wanted = std::clamp(2 * multiprocessors / std::max(1, tiles), 1, word_tiles);
        const int word_tiles_per_slice = ceil_div(word_tiles, wanted);
        words_per_slice = word_tiles_per_slice * kWords;
        slices = ceil_div(word_tiles, word_tiles_per_slice);
        const size_t most = std::max<size_t>(1, kScratchBytes / (slices * kPixels * kRanks * 8));
        tiles_per_launch = static_cast<int>(std::min<size_t>(tiles, most));
    }

    // Places of `Candidates`: pixels of one launch.
    size_t slots() const { return size_t(tiles_per_launch) * kPixels; }
    size_t scratch_bytes() const { return slots() * slices * kRanks * (sizeof(float) + sizeof(int)); }
};

// The best words of every slice, [slices][kRanks][slots].
struct Candidates {
    float* scores;
    int* ids;
    size_t slots;

    Candidates(void* scratch, const Plan& plan)
        : scores(static_cast<float*>(scratch)),
          ids(reinterpret_cast<int*>(scores + plan.slots() * plan.slices * kRanks)),
          slots(plan.slots()) {}

    __device__ __forceinline__ size_t at(int slice, int rank, size_t slot) const {
        return (size_t(slice) * kRanks + rank) * slots + slot;
    }
};

// The best three words seen so far: by score, the lowest id first among equals. No score is NaN.
struct Top {
    float scores[kRanks] = {-INFINITY, -INFINITY, -INFINITY};
    int ids[kRanks] = {INT_MAX, INT_MAX, INT_MAX};

    __device__ __forceinline__ bool beats(float score, int id, int rank) const {
        return score > scores[rank] || (score == scores[rank] && id < ids[rank]);
    }

    __device__ __forceinline__ void set(int rank, float score, int id) {
        scores[rank] = score, ids[rank] = id;
    }

    __device__ __forceinline__ void offer(float score, int id) {
        if (!beats(score, id, 2)) return;
        if (!beats(score, id, 1)) return set(2, score, id);
        set(2, scores[1], ids[1]);
        if (!beats(score, id, 0)) return set(1, score, id);
        set(1, scores[0], ids[0]);
        set(0, score, id);
    }
};

constexpr int kPixelTiles = kWarpPixels / 16, kWordTiles = kWarpWords / 8;  // of one warp, m16n8k16
// A thread has two rows of each product, so it ranks words for that many pixels.
constexpr int kLists = kPixelTiles * 2;

// How the numbers are multiplied: as one Part, or as the sum of three.
template <typename T, int kCount>
struct Split {
    using Part = T;
    static constexpr int kParts = kCount;
    // Channels at a time. Three parts leave fewer registers for the tile that waits.
    static constexpr int kDepth = kParts == 1 ? 32 : 16;
    static constexpr int kPitch = kDepth + 8;        // ldmatrix without bank conflicts
    static constexpr int kLanes = kDepth / kVector;  // threads that load one pixel or word
    static constexpr int kStep = kThreads / kLanes;  // pixels or words that the block loads at once
};

// The block's tiles of 64 pixels and 128 words, kDepth channels deep, in kParts parts; and every thread's
// best words, which are touched once per tile of words and would take 24 registers.
template <typename How>
struct Shared {
    using Part = typename How::Part;
    Part* pixels;       // [kParts][kPixels][kPitch]
    Part* words;        // [kParts][kWords][kPitch]
    float* scales;      // [kWords], one over the word's length
    float* top_scores;  // [kLists][kRanks][kThreads]
    int* top_ids;       // likewise

    static constexpr size_t kPixelNumbers = size_t(How::kParts) * kPixels * How::kPitch;
    static constexpr size_t kWordNumbers = size_t(How::kParts) * kWords * How::kPitch;
    static constexpr size_t kTopNumbers = size_t(kLists) * kRanks * kThreads;
    static constexpr size_t kBytes = (kPixelNumbers + kWordNumbers) * sizeof(Part) + kWords * sizeof(float) +
                                     kTopNumbers * (sizeof(float) + sizeof(int));

    __device__ explicit Shared(char* memory)
        : pixels(reinterpret_cast<Part*>(memory)),
          words(pixels + kPixelNumbers),
          scales(reinterpret_cast<float*>(words + kWordNumbers)),
          top_scores(scales + kWords),
          top_ids(reinterpret_cast<int*>(top_scores + kTopNumbers)) {}

    __device__ __forceinline__ Top load_top(int list, int thread) const {
        Top top;
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
            const int at = (list * kRanks + r) * kThreads + thread;
            top.set(r, top_scores[at], top_ids[at]);
        }
        return top;
    }

    __device__ __forceinline__ void store_top(int list, int thread, const Top& top) const {
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
            const int at = (list * kRanks + r) * kThreads + thread;
            top_scores[at] = top.scores[r], top_ids[at] = top.ids[r];
        }
    }
};

// What one thread brings from global to shared memory: four channels of a few pixels and words. The next tile
// waits in registers while the tensor cores work on this one.
template <typename How>
struct Stage {
    using Part = typename How::Part;
    static constexpr int kParts = How::kParts;
    static constexpr int kPixelRows = kPixels / How::kStep, kWordRows = kWords / How::kStep;
    using Number = std::conditional_t<kParts == 1, Part, float>;
    Number pixels[kPixelRows][kVector];
    Number words[kWordRows][kVector];

    __device__ __forceinline__ static int row(int i) { return threadIdx.x / How::kLanes + i * How::kStep; }

    // Of the rows from `first` on, those before `end`; `channel` is the tile's first.
    template <int kRows, typename T>
    __device__ __forceinline__ static void load_rows(Number (&rows)[kRows][kVector], const T* all,
                                                     unsigned stride, bool aligned, int first, int end,
                                                     int channel, int channels) {
        const int d = channel + threadIdx.x % How::kLanes * kVector;
        // Unsigned products take fewer registers.
        const T* from = all + size_t(unsigned(first + row(0))) * stride + unsigned(d);
#pragma unroll
        for (int i = 0; i < kRows; ++i, from += size_t(How::kStep) * stride)
            load_neighbours(rows[i], from, first + row(i) < end ? channels - d : 0, aligned);
    }

    template <int kRows>
    __device__ __forceinline__ static void store_rows(Part* to, Number (&rows)[kRows][kVector]) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            uint32_t packed[2];
            take_part<Part>(packed, rows[i]);
            Part* at = to + row(i) * How::kPitch + threadIdx.x % How::kLanes * kVector;
            *reinterpret_cast<uint2*>(at) = {packed[0], packed[1]};
        }
    }

    // Also adds the squares to `squares`.
    __device__ __forceinline__ void store(const Shared<How>& shared, float (&squares)[kWordRows]) {
#pragma unroll
        for (int i = 0; i < kWordRows; ++i)
#pragma unroll
            for (int c = 0; c < kVector; ++c)
                squares[i] = std::fma(widen(words[i][c]), widen(words[i][c]), squares[i]);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            store_rows(shared.pixels + part * kPixels * How::kPitch, pixels);
            store_rows(shared.words + part * kWords * How::kPitch, words);
        }
    }
};

// The types that may come: with one part the tensor cores' own, else any.
template <typename How, typename Body>
__device__ __forceinline__ void visit(Number type, const Body& body) {
    if constexpr (How::kParts == 1) {
        body(typename How::Part{});
    } else {
        switch (type) {
            case Number::kFloat32:
                return body(float{});
            case Number::kFloat64:
                return body(double{});
            case Number::kFloat16:
                return body(half{});
            case Number::kBFloat16:
                return body(bf16{});
        }
    }
}

// Adds the products of one warp's 32 pixels and 32 words over the kDepth channels in shared memory.
template <typename How>
__device__ __forceinline__ void multiply(const Shared<How>& shared,
                                         float (&sums)[kPixelTiles][kWordTiles][4]) {
    using Part = typename How::Part;
    constexpr int kParts = How::kParts, kDepth = How::kDepth, kPitch = How::kPitch;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int matrix = lane / 8, row = lane % 8;
    const Part* pixels =
        shared.pixels + (row + matrix % 2 * 8 + warp / kWarpsAcross * kWarpPixels) * kPitch + matrix / 2 * 8;
    const Part* words =
        shared.words + (row + matrix / 2 * 8 + warp % kWarpsAcross * kWarpWords) * kPitch + matrix % 2 * 8;
#pragma unroll 1  // both steps at once would need more registers than two blocks per multiprocessor leave
    for (int depth = 0; depth < kDepth; depth += 16) {
        uint32_t a[kParts][kPixelTiles][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int m = 0; m < kPixelTiles; ++m)
                ldmatrix<4>(a[part][m], pixels + (part * kPixels + m * 16) * kPitch + depth);
#pragma unroll
        for (int n = 0; n < kWordTiles; n += 2) {
            uint32_t b[kParts][4];
#pragma unroll
            for (int part = 0; part < kParts; ++part)
                ldmatrix<4>(b[part], words + (part * kWords + n * 8) * kPitch + depth);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                // Tensor cores cut off what does not fit a sum, so long sums are kept outside of them.
                float fresh[kPixelTiles][4] = {};
#pragma unroll
                for (int order = kParts - 1; order >= 0; --order)  // the small products first
#pragma unroll
                    for (int part = order; part >= 0; --part)
#pragma unroll
                        for (int m = 0; m < kPixelTiles; ++m) {
                            const uint32_t right[2] = {b[order - part][2 * h], b[order - part][2 * h + 1]};
                            mma_m16n8k16<Part>(fresh[m], a[part][m], right);
                        }
#pragma unroll
                for (int m = 0; m < kPixelTiles; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[m][n + h][i] += fresh[m][i];
            }
        }
    }
}

template <typename How>
__global__ void __launch_bounds__(kThreads, 2)
    class_votes_kernel(Problem p, Plan plan, int first_tile, Candidates candidates) {
    const Shared<How> shared(dynamic_shared());
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int tile = first_tile + blockIdx.x, image = tile / plan.tiles_per_image;
    // The pixels of all images are rows of one matrix.
    const int pixel_end = (image + 1) * p.num_pixels;
    const int first_pixel = image * p.num_pixels + (tile - image * plan.tiles_per_image) * kPixels;
    const int slice_begin = blockIdx.y * plan.words_per_slice;
    const int slice_end = min(slice_begin + plan.words_per_slice, p.num_words);

    Stage<How> stage;
    const auto fetch = [&](int first_word, int channel) {
        visit<How>(p.pixels.type, [&](auto number) {
            const auto* all = p.pixels.as<decltype(number)>();
            stage.load_rows(stage.pixels, all, p.channels, p.pixels.aligned, first_pixel, pixel_end, channel,
                            p.channels);
        });
        visit<How>(p.words.type, [&](auto number) {
            const auto* all = p.words.as<decltype(number)>();
            stage.load_rows(stage.words, all, p.word_stride, p.words.aligned, first_word, p.num_words,
                            channel, p.channels);
        });
    };

    for (int list = 0; list < kLists; ++list) shared.store_top(list, threadIdx.x, Top());
    fetch(slice_begin, 0);
    for (int first_word = slice_begin; first_word < slice_end; first_word += kWords) {
        float sums[kPixelTiles][kWordTiles][4] = {};
        float squares[Stage<How>::kWordRows] = {};
        for (int channel = 0; channel < p.channels; channel += How::kDepth) {
            __syncthreads();
            stage.store(shared, squares);
            __syncthreads();
            const bool more = channel + How::kDepth < p.channels;
            if (more || first_word + kWords < slice_end)
                fetch(more ? first_word : first_word + kWords, more ? channel + How::kDepth : 0);
            multiply(shared, sums);
        }

#pragma unroll
        for (int i = 0; i < Stage<How>::kWordRows; ++i) {
            const float length = std::sqrt(warp_sum<How::kLanes>(squares[i]));
            const float scale = 1.0f / (length > kSmallestLength ? length : kSmallestLength);
            if (threadIdx.x % How::kLanes == 0) shared.scales[stage.row(i)] = scale;
        }
        __syncthreads();
#pragma unroll
        for (int list = 0; list < kLists; ++list) {
            Top top = shared.load_top(list, threadIdx.x);
#pragma unroll
            for (int n = 0; n < kWordTiles; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int word = warp % kWarpsAcross * kWarpWords + n * 8 + lane % 4 * 2 + c;
                    const float score = sums[list / 2][n][list % 2 * 2 + c] * shared.scales[word];
                    if (first_word + word < slice_end) top.offer(score, first_word + word);
                }
            shared.store_top(list, threadIdx.x, top);
        }
        __syncthreads();
    }

    // Four lanes of four warps have each seen other words of the same pixel.
    if (threadIdx.x >= kPixels || first_pixel + int(threadIdx.x) >= pixel_end) return;
    const int pixel = threadIdx.x % kWarpPixels, first_warp = threadIdx.x / kWarpPixels * kWarpsAcross;
    Top top;
    for (int across = 0; across < kWarpsAcross; ++across)
        for (int quarter = 0; quarter < 4; ++quarter) {
            const int thread = (first_warp + across) * kWarpSize + pixel % 8 * 4 + quarter;
            const Top other = shared.load_top(pixel / 8, thread);
            for (int r = 0; r < kRanks; ++r) top.offer(other.scores[r], other.ids[r]);
        }
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
        const size_t at = candidates.at(blockIdx.y, r, size_t(blockIdx.x) * kPixels + threadIdx.x);
        candidates.scores[at] = top.scores[r];
        candidates.ids[at] = top.ids[r];
    }
}

// Merges the slices and counts; integer sums know no order.
__global__ void __launch_bounds__(kThreads)
    class_votes_count_kernel(Problem p, Plan plan, int first_tile, int tiles, Candidates candidates) {
    const int slot = blockIdx.x * kThreads + threadIdx.x;
    if (slot >= tiles * kPixels) return;
    const int tile = first_tile + slot / kPixels, image = tile / plan.tiles_per_image;
    const int pixel = (tile - image * plan.tiles_per_image) * kPixels + slot % kPixels;
    if (pixel >= p.num_pixels) return;
    Top top;
    for (int slice = 0; slice < plan.slices; ++slice)
        for (int r = 0; r < kRanks; ++r) {
            const size_t at = candidates.at(slice, r, slot);
            top.offer(candidates.scores[at], candidates.ids[at]);
        }
    constexpr unsigned long long kVotes[kRanks] = {100, 10, 1};
#pragma unroll
    for (int r = 0; r < kRanks; ++r)
        if (top.ids[r] < p.num_words)
            atomicAdd(&p.votes[size_t(image) * p.num_words + top.ids[r]], kVotes[r]);
}

template <typename How>
cudaError_t run_split(const Problem& p, const Plan& plan, cudaStream_t stream) {
    const Candidates candidates(p.scratch, plan);
    for (int first = 0; first < plan.tiles; first += plan.tiles_per_launch) {
        const int tiles = std::min(plan.tiles_per_launch, plan.tiles - first);
        cudaError_t error = launch(class_votes_kernel<How>, dim3(tiles, plan.slices), kThreads,
                                   Shared<How>::kBytes, stream, p, plan, first, candidates);
        if (error != cudaSuccess) return error;
        error = launch(class_votes_count_kernel, ceil_div(tiles * kPixels, kThreads), kThreads, 0, stream, p,
                       plan, first, tiles, candidates);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

// Needs at least one word; `plan` made for this problem.
inline cudaError_t run(Problem p, const Plan& plan, cudaStream_t stream) {
    p.pixels.aligned = p.pixels.is_aligned(p.channels);
    p.words.aligned = p.words.is_aligned(p.word_stride);
    const Number type = p.pixels.type;
    if (type == p.words.type && type == Number::kBFloat16) return run_split<Split<bf16, 1>>(p, plan, stream);
    if (type == p.words.type && type == Number::kFloat16) return run_split<Split<half, 1>>(p, plan, stream);
    return run_split<Split<bf16, 3>>(p, plan, stream);
}

}  // namespace errseg::class_votes
