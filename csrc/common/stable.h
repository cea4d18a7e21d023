#pragma once
// LibTorch's stable ABI, target 2.10, and what every op needs on top of it. Nothing else of torch may be
// included in csrc: no ATen, c10 or pybind headers. Works with the headers of torch 2.11, hence macros.h by
// name.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

namespace errseg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

/// Carries a type as a value: `using T = typename decltype(tag)::type`.
template <typename T>
struct Type {
    using type = T;
};

/// "float32", as Python says it.
inline const char* dtype_name(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        default:
            return torch::headeronly::toString(dtype);
    }
}

/// "[2, 48] float32".
inline std::string describe(const Tensor& tensor) {
    std::string text = "[";
    for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
    return text + "] " + dtype_name(tensor.scalar_type());
}

/// Calls `body(Type<T>{})` with the tensor's floating type.
template <typename Body>
void visit_floating(const Tensor& tensor, const char* name, const Body& body) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return body(Type<float>{});
        case ScalarType::Double:
            return body(Type<double>{});
        case ScalarType::Half:
            return body(Type<Half>{});
        case ScalarType::BFloat16:
            return body(Type<BFloat16>{});
        default:
            STD_TORCH_CHECK(false, "expected ", name, " floating, got ", describe(tensor));
    }
}

/// Calls `body(Type<T>{})` with the tensor's integer type.
template <typename Body>
void visit_integer(const Tensor& tensor, const char* name, const Body& body) {
    switch (tensor.scalar_type()) {
        case ScalarType::Byte:
            return body(Type<uint8_t>{});
        case ScalarType::Char:
            return body(Type<int8_t>{});
        case ScalarType::Short:
            return body(Type<int16_t>{});
        case ScalarType::Int:
            return body(Type<int32_t>{});
        case ScalarType::Long:
            return body(Type<int64_t>{});
        case ScalarType::UInt16:
            return body(Type<uint16_t>{});
        case ScalarType::UInt32:
            return body(Type<uint32_t>{});
        case ScalarType::UInt64:
            return body(Type<uint64_t>{});
        default:
            STD_TORCH_CHECK(false, "expected ", name, " integer, got ", describe(tensor));
    }
}

/// What an op computes in: float64 for float64, float32 for everything narrower.
inline ScalarType score_dtype(const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// Calls `body(Type<S>{})` with the type that `score_dtype` names.
template <typename Body>
void visit_score(const Tensor& tensor, const Body& body) {
    if (score_dtype(tensor) == ScalarType::Double) return body(Type<double>{});
    body(Type<float>{});
}

template <typename T>
const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

/// Reads `n` elements from `start` on of a contiguous tensor, as S.
template <typename S>
using Reader = void (*)(const Tensor& tensor, int64_t start, int64_t n, S* row);

template <typename T, typename S>
void read_as(const Tensor& tensor, int64_t start, int64_t n, S* row) {
    const T* values = data<T>(tensor) + start;
    for (int64_t i = 0; i < n; ++i) row[i] = static_cast<S>(values[i]);
}

/// The reader for a floating tensor: one call per row keeps the input's type out of the kernels.
template <typename S>
Reader<S> reader(const Tensor& tensor, const char* name) {
    Reader<S> found = nullptr;
    visit_floating(tensor, name, [&](auto tag) { found = read_as<typename decltype(tag)::type, S>; });
    return found;
}

/// Starts to load `n` elements from `start` on of a contiguous tensor.
inline void prefetch(const Tensor& tensor, int64_t start, int64_t n) {
    const int64_t size = static_cast<int64_t>(tensor.element_size());
    const char* first = data<char>(tensor) + start * size;
    for (int64_t at = 0; at < n * size; at += 64) __builtin_prefetch(first + at);
}

/// The tensor itself when it is contiguous, else a copy that is.
inline Tensor as_contiguous(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

/// A matrix whose rows are contiguous and less than 2^30 numbers apart: most views are not copied.
inline Tensor with_contiguous_rows(const Tensor& matrix) {
    const bool rows = matrix.dim() == 2 && matrix.stride(1) == 1 && matrix.stride(0) >= 0;
    return rows && matrix.stride(0) < (int64_t(1) << 30) ? matrix : as_contiguous(matrix);
}

/// An uninitialised tensor on the device of `like`.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(
        like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

/// Fails with "expected <expected>, got [shape] dtype" unless `condition` holds.
inline void expect(bool condition, const char* expected, const Tensor& got) {
    STD_TORCH_CHECK(condition, "expected ", expected, ", got ", describe(got));
}

}  // namespace errseg
