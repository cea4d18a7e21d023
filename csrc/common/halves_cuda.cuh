// Tensors of float16 or bfloat16, as kernels on tensor cores take them.
#pragma once

#include <optional>

#include "common/split.cuh"
#include "common/stable_cuda.cuh"

namespace errseg {

inline Number type_of(const Tensor& tensor) {
    const ScalarType type = tensor.scalar_type();
    expect(type == ScalarType::Half || type == ScalarType::BFloat16, "float16 or bfloat16", tensor);
    return type == ScalarType::Half ? Number::kFloat16 : Number::kBFloat16;
}

/// A tensor as kernels read it: of the type and on the device of `like`, contiguous, aligned to any access.
inline const void* take(const Tensor& tensor, const Tensor& like, int64_t size, const char* name) {
    expect_same_device(like, tensor, name);
    const void* result = tensor.const_data_ptr();
    expect(tensor.scalar_type() == like.scalar_type() && tensor.numel() == size && tensor.is_contiguous() &&
               reinterpret_cast<uintptr_t>(result) % 16 == 0,
           name, tensor);
    return result;
}

inline const void* take(const std::optional<Tensor>& tensor, const Tensor& like, int64_t size,
                        const char* name) {
    return tensor ? take(*tensor, like, size, name) : nullptr;
}

}  // namespace errseg
