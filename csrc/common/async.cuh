// Asynchronous copies from global to shared memory (sm_80 and later). In tests they are emulated, and arrive
// when they are waited for.
#pragma once

#include "common/device.cuh"

namespace errseg {

constexpr int kAsyncBytes = 16;  // of one copy, and what both addresses are aligned to

// Copies kAsyncBytes, or writes zeros when `inside` is false; `from` is then not read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
#ifdef ERRSEG_EMULATED
    emulator::copy_async(to, from, inside ? kAsyncBytes : 0, kAsyncBytes);
#else
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(address), "l"(from), "r"(inside ? kAsyncBytes : 0)
                 : "memory");
#endif
}

// Closes a group of copies; a group may be empty.
__device__ __forceinline__ void commit_async() {
#ifdef ERRSEG_EMULATED
    emulator::commit_async();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Pending` of the thread's groups are under way; others see the copies after a barrier.
template <int Pending>
__device__ __forceinline__ void wait_async() {
#ifdef ERRSEG_EMULATED
    emulator::wait_async(Pending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

}  // namespace errseg
