// LibTorch's stable ABI for the CUDA launchers: stream, device types, errors. Kernels do without it.
#pragma once

#include "common/device.cuh"
#include "common/stable.h"

namespace errseg {

/// PyTorch's current stream on the tensor's device.
inline cudaStream_t current_stream(const Tensor& tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

/// Fails with the runtime's words when a call was refused, which the next launch then does not report again.
inline void check(cudaError_t error, const char* op) {
    if (error != cudaSuccess) cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

/// Kernels count in 32 bits along each axis.
inline int as_int(int64_t size, const char* name) {
    STD_TORCH_CHECK(size >= 0 && size <= INT_MAX / 2, "expected ", name, " below 2^30, got ", size);
    return static_cast<int>(size);
}

inline void expect_same_device(const Tensor& first, const Tensor& second, const char* name) {
    STD_TORCH_CHECK(
        first.is_cuda() && second.is_cuda() && first.get_device_index() == second.get_device_index(),
        "expected ", name, " on cuda:", first.get_device_index(), ", got ", describe(second), " elsewhere");
}

/// As `visit_floating`, with the types that kernels know.
template <typename Body>
void visit_device_floating(const Tensor& tensor, const char* name, const Body& body) {
    visit_floating(tensor, name, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (std::is_same_v<T, Half>) {
            body(Type<half>{});
        } else if constexpr (std::is_same_v<T, BFloat16>) {
            body(Type<bf16>{});
        } else {
            body(Type<T>{});
        }
    });
}

}  // namespace errseg
