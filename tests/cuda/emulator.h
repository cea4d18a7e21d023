// Runs CUDA kernels on the CPU, for tests: `g++ -std=c++20 -include emulator.h driver.cpp`.
//
// One fiber per CUDA thread, one block after another, both in an order drawn from the seed: a warp may run
// far ahead of its neighbours, so a missing barrier shows up as a wrong result for some seed. What the
// hardware leaves undefined is a Fault here: a barrier that not every thread reaches, or that threads reach
// at different lines; lanes of one warp in different collectives; a collective that waits for a lane which
// has left the kernel.
//
// Dynamic shared memory is allocated per block with its exact size and filled with 0xFF (NaN), so that
// AddressSanitizer sees an overrun and a test sees an unwritten cell. Static shared memory keeps the previous
// block's values. cp.async copies when it is waited for, never earlier. mma.sync and ldmatrix have the
// fragment layout of the PTX manual; sums are cut off, not rounded, to float32, as tensor cores are known to
// do.
//
// Not covered: blocks that run at the same time, memory ordering between threads, wgmma, TMA, clusters,
// textures.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define ERRSEG_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __align__(n) alignas(n)
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

namespace emulator {

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kSharedLimit = 227 << 10;  // what one block may have on sm_90

// A place where threads meet: the operation, and the line that called it.
struct Site {
    const char* what = nullptr;
    int line = 0;
    bool operator==(const Site& other) const { return what == other.what && line == other.line; }
    std::string text() const { return std::string(what) + " (line " + std::to_string(line) + ")"; }
};

enum class State { kReady, kAtWarp, kAtBlock, kExited };

struct PendingCopy {
    void* destination;
    const void* source;
    size_t bytes;  // the rest of `width` becomes zero
    size_t width;
};

struct Fiber {
    ucontext_t context;
    jmp_buf resume;
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    void* fake_stack = nullptr;

    State state = State::kReady;
    uint3 index{};
    int lane = 0, warp = 0;
    Site site;
    unsigned mask = 0;
    void* payload = nullptr;
    std::deque<std::vector<PendingCopy>> copies;  // committed groups; the last one is still open
};

class Machine {
  public:
    dim3 grid, block;
    uint3 block_index{};
    Fiber* current = nullptr;
    unsigned seed = 0;  // 0: every thread in order; otherwise a random schedule

    void* shared() const { return shared_.get(); }
    size_t shared_bytes() const { return shared_bytes_; }

    void run(dim3 grid_size, dim3 block_size, size_t dynamic_shared, std::function<void()> kernel) {
        const size_t threads = size_t(block_size.x) * block_size.y * block_size.z;
        if (threads == 0 || threads > 1024) throw Fault("a block of " + std::to_string(threads) + " threads");
        if (grid_size.x == 0 || grid_size.x > INT_MAX || !inside(grid_size.y) || !inside(grid_size.z))
            throw Fault("a grid of " + std::to_string(grid_size.x) + " x " + std::to_string(grid_size.y) +
                        " x " + std::to_string(grid_size.z) + " blocks");
        if (dynamic_shared > kSharedLimit)
            throw Fault("a block with " + std::to_string(dynamic_shared) + " bytes of shared memory");
        grid = grid_size, block = block_size, kernel_ = std::move(kernel), shared_bytes_ = dynamic_shared;
        reserve(threads);
        random_.seed(seed);
        std::vector<size_t> order(size_t(grid.x) * grid.y * grid.z);
        for (size_t i = 0; i < order.size(); ++i) order[i] = i;
        if (seed) std::shuffle(order.begin(), order.end(), random_);
        for (size_t i : order) {
            block_index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                           unsigned(i / grid.x / grid.y)};
            run_block(threads);
        }
    }

    // Threads of the block meet; the last one to come runs `join` over everybody's payload.
    template <typename Join>
    void meet_block(Site site, void* payload, Join join) {
        arrive(State::kAtBlock, site, 0, payload);
        size_t arrived = 0;
        for (auto& fiber : live_) arrived += fiber->state == State::kAtBlock;
        if (arrived == live_.size()) {
            for (auto& fiber : live_)
                if (!(fiber->site == site))
                    fault("divergent barrier: " + site.text() + " and " + fiber->site.text());
            join(live_);
            for (auto& fiber : live_) fiber->state = State::kReady;
        }
        yield();
    }

    // Lanes named by `mask` meet; the last one to come runs `join(lane -> payload)`, null for lanes not in
    // the mask.
    template <typename Join>
    void meet_warp(Site site, unsigned mask, void* payload, Join join) {
        arrive(State::kAtWarp, site, mask, payload);
        if (!(mask >> current->lane & 1)) fault(site.text() + ": the calling lane is not in its mask");
        const size_t first = size_t(current->warp) * kWarp, last = std::min(first + kWarp, live_.size());
        void* payloads[kWarp] = {};
        bool complete = true;
        for (size_t i = first; i < last; ++i) {
            const Fiber& other = *live_[i];
            if (!(mask >> other.lane & 1)) continue;
            if (other.state == State::kExited)
                fault(site.text() + " waits for a lane that has left the kernel");
            if (other.state != State::kAtWarp) {
                complete = false;
            } else if (!(other.site == site) || other.mask != mask) {
                fault("lanes of one warp meet in " + site.text() + " and in " + other.site.text());
            } else {
                payloads[other.lane] = other.payload;
            }
        }
        if (complete) {
            join(payloads);
            for (size_t i = first; i < last; ++i)
                if (mask >> live_[i]->lane & 1) live_[i]->state = State::kReady;
        }
        yield();
    }

    [[noreturn]] void fault(const std::string& what) const {
        const uint3& t = current->index;
        throw Fault(what + "; block " + std::to_string(block_index.x) + " " + std::to_string(block_index.y) +
                    " " + std::to_string(block_index.z) + ", thread " + std::to_string(t.x) + " " +
                    std::to_string(t.y) + " " + std::to_string(t.z));
    }

  private:
    static bool inside(unsigned blocks) { return blocks >= 1 && blocks <= 65535; }

    void reserve(size_t threads) {
        while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
        live_.clear();
        for (size_t i = 0; i < threads; ++i) live_.push_back(fibers_[i].get());
    }

    void run_block(size_t threads) {
        shared_.reset(shared_bytes_ ? std::malloc(shared_bytes_) : nullptr);
        if (shared_bytes_) std::memset(shared_.get(), 0xFF, shared_bytes_);
        for (size_t i = 0; i < threads; ++i) {
            Fiber& fiber = *live_[i];
            fiber.state = State::kReady;
            fiber.index = {unsigned(i % block.x), unsigned(i / block.x % block.y),
                           unsigned(i / block.x / block.y)};
            fiber.lane = int(i % kWarp), fiber.warp = int(i / kWarp);
            fiber.copies.clear();
        }
        const size_t warps = (threads + kWarp - 1) / kWarp;
        size_t warp = 0;
        while (pick(warps, warp)) {
            std::vector<Fiber*> ready = ready_lanes(warp);
            if (seed) std::shuffle(ready.begin(), ready.end(), random_);
            for (Fiber* fiber : ready) {
                resume(*fiber);
                if (error_) {
                    abandon();
                    std::rethrow_exception(std::exchange(error_, nullptr));
                }
            }
        }
        for (Fiber* fiber : live_)
            if (fiber->state != State::kExited) stuck(*fiber);
    }

    // After a fault the threads never go on; the next kernel gets fresh stacks.
    void abandon() {
        for (Fiber* fiber : live_) fiber->started = false;
    }

    // The warp to run next: mostly the one that ran last, so that it runs ahead of the others; false when
    // none can.
    bool pick(size_t warps, size_t& warp) {
        if (seed && random_() % 8 == 0) warp = random_() % warps;
        for (size_t i = 0; i < warps; ++i, warp = (warp + 1) % warps)
            if (!ready_lanes(warp).empty()) return true;
        return false;
    }

    std::vector<Fiber*> ready_lanes(size_t warp) const {
        std::vector<Fiber*> ready;
        for (size_t i = warp * kWarp; i < std::min((warp + 1) * kWarp, live_.size()); ++i)
            if (live_[i]->state == State::kReady) ready.push_back(live_[i]);
        return ready;
    }

    [[noreturn]] void stuck(Fiber& fiber) {
        abandon();
        current = &fiber;
        const bool block_barrier = fiber.state == State::kAtBlock;
        fault(fiber.site.text() + (block_barrier ? " is not reached by every thread of the block"
                                                 : " is not reached by every lane of its mask"));
    }

    void arrive(State state, Site site, unsigned mask, void* payload) {
        current->state = state, current->site = site, current->mask = mask, current->payload = payload;
    }

    // ---- switching stacks; ucontext makes system calls, so it only starts a fiber (AddressSanitizer wants
    // it always)

    void resume(Fiber& fiber) {
        current = &fiber;
        const bool fresh = !fiber.started;
        if (fresh) {
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStackBytes;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, &Machine::entry, 0);
            fiber.started = true;
        }
#if defined(__SANITIZE_ADDRESS__)
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
        swapcontext(&scheduler_, &fiber.context);
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
        if (_setjmp(scheduler_jump_) == 0) {
            if (fresh) setcontext(&fiber.context);
            _longjmp(fiber.resume, 1);
        }
#endif
    }

    void yield() {
#if defined(__SANITIZE_ADDRESS__)
        Fiber& fiber = *current;
        __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
        swapcontext(&fiber.context, &scheduler_);
        __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#else
        if (_setjmp(current->resume) == 0) _longjmp(scheduler_jump_, 1);
#endif
    }

    static void entry();

    struct Free {
        void operator()(void* p) const { std::free(p); }
    };

    std::function<void()> kernel_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<Fiber*> live_;
    std::unique_ptr<void, Free> shared_;
    size_t shared_bytes_ = 0;
    std::mt19937 random_;
    std::exception_ptr error_;
    ucontext_t scheduler_;
    jmp_buf scheduler_jump_;
    const void* scheduler_stack_ = nullptr;
    size_t scheduler_stack_bytes_ = 0;
};

inline Machine& machine() {
    static Machine instance;
    return instance;
}

inline void Machine::entry() {
    Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack_, &m.scheduler_stack_bytes_);
#endif
    for (;;) {  // one turn per block
        try {
            m.kernel_();
            for (const auto& group : m.current->copies)
                if (!group.empty())
                    m.fault("the kernel ends with an asynchronous copy that nobody waited for");
        } catch (...) {
            m.error_ = std::current_exception();
        }
        m.current->state = State::kExited;
        m.yield();
    }
}

template <typename Kernel>
void run(dim3 grid, dim3 block, size_t shared_bytes, Kernel&& kernel) {
    machine().run(grid, block, shared_bytes, std::forward<Kernel>(kernel));
}

// Every lane of `mask` gets the value of the lane that `source(own lane)` names, its own where that is not
// there.
template <typename T, typename Source>
T exchange(Site site, unsigned mask, T value, Source source) {
    struct Slot {
        T in, out;
        int from;
    } slot{value, value, source(machine().current->lane)};
    machine().meet_warp(site, mask, &slot, [](void** payloads) {
        for (int lane = 0; lane < kWarp; ++lane) {
            auto* to = static_cast<Slot*>(payloads[lane]);
            if (to && to->from >= 0 && to->from < kWarp && payloads[to->from])
                to->out = static_cast<Slot*>(payloads[to->from])->in;
        }
    });
    return slot.out;
}

// Every lane of `mask` gets the values of all lanes of `mask` folded by `fold`.
template <typename T, typename Fold>
T reduce(Site site, unsigned mask, T value, Fold fold) {
    struct Slot {
        T in, out;
    } slot{value, value};
    machine().meet_warp(site, mask, &slot, [&](void** payloads) {
        const Slot* first = nullptr;
        T total{};
        for (int lane = 0; lane < kWarp; ++lane)
            if (auto* s = static_cast<const Slot*>(payloads[lane]))
                total = first ? fold(total, s->in) : s->in, first = s;
        for (int lane = 0; lane < kWarp; ++lane)
            if (auto* s = static_cast<Slot*>(payloads[lane])) s->out = total;
    });
    return slot.out;
}

template <typename Fold>
int reduce_block(Site site, int value, int start, Fold fold) {
    struct Slot {
        int in, out;
    } slot{value, 0};
    machine().meet_block(site, &slot, [&](const std::vector<Fiber*>& fibers) {
        int total = start;
        for (const Fiber* f : fibers) total = fold(total, static_cast<const Slot*>(f->payload)->in);
        for (const Fiber* f : fibers) static_cast<Slot*>(f->payload)->out = total;
    });
    return slot.out;
}

inline int sub_lane(int lane, int width) {
    return lane & (width - 1);
}

// ---- numbers of 16 bits

inline uint16_t bf16_bits(float value) {
    uint32_t u = std::bit_cast<uint32_t>(value);
    if (value != value) return 0x7FFF;
    u += 0x7FFF + (u >> 16 & 1);  // nearest, ties to even
    return uint16_t(u >> 16);
}
inline float bf16_value(uint16_t bits) {
    return std::bit_cast<float>(uint32_t(bits) << 16);
}

inline uint16_t half_bits(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value), sign = u >> 16 & 0x8000;
    const float magnitude = std::fabs(value);
    if (value != value) return 0x7FFF;
    if (magnitude >= 65520.0f) return uint16_t(sign | 0x7C00);
    if (magnitude < 0x1p-14f)  // subnormal: a multiple of 2^-24
        return uint16_t(sign | uint32_t(std::nearbyint(magnitude * 0x1p24f)));
    const uint32_t m = u & 0x7FFFFFFF;
    return uint16_t(sign | (((m + 0xFFF + (m >> 13 & 1)) >> 13) - (112 << 10)));
}
inline float half_value(uint16_t bits) {
    const float sign = bits & 0x8000 ? -1.0f : 1.0f;
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign *
           (exponent ? std::ldexp(float(1024 + mantissa), exponent - 25) : std::ldexp(float(mantissa), -24));
}

}  // namespace emulator

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
    return emulator::bf16_value(v.bits);
}
inline float __half2float(__half v) {
    return emulator::half_value(v.bits);
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    return {emulator::bf16_bits(v)};
}
inline __half __float2half_rn(float v) {
    return {emulator::half_bits(v)};
}

namespace emulator {

// ---- tensor cores: fragments as in the PTX manual, "Matrix Fragments for mma.m16n8k16" and "ldmatrix"

template <typename T>
float number(uint32_t pair, int which) {
    const auto bits = uint16_t(which ? pair >> 16 : pair);
    return std::is_same_v<T, __half> ? half_value(bits) : bf16_value(bits);
}

// d[16x8] += a[16x16] b[16x8], inputs T, sums in float32.
template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
    struct Slot {
        float* d;
        const uint32_t* a;
        const uint32_t* b;
    } slot{d, a, b};
    machine().meet_warp({"mma.sync.m16n8k16", line}, ~0u, &slot, [](void** payloads) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < kWarp; ++lane) {
            const auto& s = *static_cast<const Slot*>(payloads[lane]);
            const int group = lane / 4, pair = 2 * (lane % 4);
            for (int i = 0; i < 8; ++i)  // a0..a7: rows alternate every register, columns move on after two
                left[group + 8 * (i / 2 % 2)][pair + i % 2 + 8 * (i / 4)] = number<T>(s.a[i / 2], i % 2);
            for (int i = 0; i < 4; ++i)
                right[pair + i % 2 + 8 * (i / 2)][group] = number<T>(s.b[i / 2], i % 2);
        }
        for (int lane = 0; lane < kWarp; ++lane) {
            const auto& s = *static_cast<const Slot*>(payloads[lane]);
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                double sum = s.d[i];
                for (int k = 0; k < 16; ++k) sum += double(left[row][k]) * right[k][column];
                const auto rounded = static_cast<float>(sum);
                s.d[i] = std::fabs(rounded) > std::fabs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
            }
        }
    });
}

// `Count` 8x8 matrices of 16-bit numbers; lane 8 m + r brings the address of row r of matrix m.
template <int Count, bool Transposed>
void ldmatrix(uint32_t (&registers)[Count], const void* row, int line) {
    struct Slot {
        uint32_t* registers;
        const char* row;
    } slot{registers, static_cast<const char*>(row)};
    const auto* begin = static_cast<const char*>(machine().shared());
    if (machine().current->lane < 8 * Count) {
        if (reinterpret_cast<uintptr_t>(row) % 16)
            machine().fault("ldmatrix: a row is not aligned to 16 bytes");
        if (begin && (slot.row < begin || slot.row + 16 > begin + machine().shared_bytes()))
            machine().fault("ldmatrix: a row lies outside dynamic shared memory");
    }
    machine().meet_warp({Transposed ? "ldmatrix.trans" : "ldmatrix", line}, ~0u, &slot, [](void** payloads) {
        for (int m = 0; m < Count; ++m) {
            uint16_t matrix[8][8];
            for (int r = 0; r < 8; ++r)
                std::memcpy(matrix[r], static_cast<const Slot*>(payloads[8 * m + r])->row, sizeof matrix[r]);
            for (int lane = 0; lane < kWarp; ++lane) {
                const int r = lane / 4, c = 2 * (lane % 4);
                const uint32_t low = Transposed ? matrix[c][r] : matrix[r][c];
                const uint32_t high = Transposed ? matrix[c + 1][r] : matrix[r][c + 1];
                static_cast<const Slot*>(payloads[lane])->registers[m] = low | high << 16;
            }
        }
    });
}

// ---- asynchronous copies

inline void copy_async(void* destination, const void* source, size_t bytes, size_t width) {
    auto& groups = machine().current->copies;
    if (reinterpret_cast<uintptr_t>(destination) % width ||
        (bytes && reinterpret_cast<uintptr_t>(source) % width))
        machine().fault("cp.async: an address is not aligned to the size of the copy");
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({destination, source, bytes, width});
}
inline void commit_async() {
    machine().current->copies.emplace_back();
}
inline void wait_async(size_t pending_groups) {
    auto& groups = machine().current->copies;
    if (groups.empty()) return;
    while (groups.size() - 1 > pending_groups) {  // the open group does not count
        for (const PendingCopy& copy : groups.front()) {
            std::memset(copy.destination, 0, copy.width);
            std::memcpy(copy.destination, copy.source, copy.bytes);
        }
        groups.pop_front();
    }
}

}  // namespace emulator

#define threadIdx (emulator::machine().current->index)
#define blockIdx (emulator::machine().block_index)
#define blockDim (emulator::machine().block)
#define gridDim (emulator::machine().grid)
constexpr int warpSize = emulator::kWarp;

// ---- intrinsics; the defaulted argument is the caller's line

#define EMULATOR_LINE int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_LINE) {
    emulator::machine().meet_block({"__syncthreads", line}, nullptr, [](const auto&) {});
}
inline int __syncthreads_or(int p, EMULATOR_LINE) {
    return emulator::reduce_block({"__syncthreads_or", line}, p, 0, [](int a, int b) { return int(a || b); });
}
inline int __syncthreads_and(int p, EMULATOR_LINE) {
    return emulator::reduce_block({"__syncthreads_and", line}, p, 1,
                                  [](int a, int b) { return int(a && b); });
}
inline int __syncthreads_count(int p, EMULATOR_LINE) {
    return emulator::reduce_block({"__syncthreads_count", line}, p, 0,
                                  [](int a, int b) { return a + (b != 0); });
}
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_LINE) {
    emulator::machine().meet_warp({"__syncwarp", line}, mask, nullptr, [](void**) {});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_LINE) {
    return emulator::exchange({"__shfl_sync", line}, mask, value, [=](int lane) {
        return lane - emulator::sub_lane(lane, width) + emulator::sub_lane(source, width);
    });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_LINE) {
    return emulator::exchange({"__shfl_xor_sync", line}, mask, value, [=](int lane) {
        const int from = lane ^ bits;
        return from / width > lane / width ? lane : from;  // lower segments may be read, higher ones not
    });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_LINE) {
    return emulator::exchange({"__shfl_down_sync", line}, mask, value, [=](int lane) {
        return emulator::sub_lane(lane, width) + int(delta) < width ? lane + int(delta) : lane;
    });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_LINE) {
    return emulator::exchange({"__shfl_up_sync", line}, mask, value, [=](int lane) {
        return emulator::sub_lane(lane, width) >= int(delta) ? lane - int(delta) : lane;
    });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_LINE) {
    const unsigned bit = predicate ? 1u << emulator::machine().current->lane : 0u;
    return emulator::reduce({"__ballot_sync", line}, mask, bit, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_LINE) {
    return emulator::reduce({"__any_sync", line}, mask, int(predicate != 0),
                            [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_LINE) {
    return emulator::reduce({"__all_sync", line}, mask, int(predicate != 0),
                            [](int a, int b) { return a & b; });
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value, EMULATOR_LINE) {
    return emulator::reduce({"__reduce_add_sync", line}, mask, value, [](T a, T b) { return T(a + b); });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, EMULATOR_LINE) {
    return emulator::reduce({"__reduce_max_sync", line}, mask, value,
                            [](T a, T b) { return std::max(a, b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, EMULATOR_LINE) {
    return emulator::reduce({"__reduce_min_sync", line}, mask, value,
                            [](T a, T b) { return std::min(a, b); });
}

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    return std::exchange(*address, T(*address + value));
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
    return std::exchange(*address, std::max(*address, value));
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
    return std::exchange(*address, std::min(*address, value));
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
    return std::exchange(*address, value);
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
    return std::exchange(*address, *address == compare ? value : *address);
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
    return std::exchange(*address, T(*address | value));
}

inline void __threadfence() {}
inline void __threadfence_block() {}
template <typename T>
T __ldg(const T* address) {
    return *address;
}
inline int __popc(unsigned v) {
    return std::popcount(v);
}
inline int __ffs(int v) {
    return v ? std::countr_zero(unsigned(v)) + 1 : 0;
}
inline int __clz(int v) {
    return std::countl_zero(unsigned(v));
}
inline float __int_as_float(int v) {
    return std::bit_cast<float>(v);
}
inline int __float_as_int(float v) {
    return std::bit_cast<int>(v);
}
inline unsigned __float_as_uint(float v) {
    return std::bit_cast<unsigned>(v);
}
inline float __uint_as_float(unsigned v) {
    return std::bit_cast<float>(v);
}
using std::max;
using std::min;

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
    return cudaSuccess;
}
