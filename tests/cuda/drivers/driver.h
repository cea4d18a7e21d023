// What the drivers share: an emulated call returns null, or what went wrong.
#pragma once

#include <string>

#include "common/device.cuh"

namespace driver {

template <typename Body>
const char* guarded(int64_t seed, const Body& body) {
    static std::string message;
    emulator::machine().seed = static_cast<unsigned>(seed);
    try {
        if (body() == cudaSuccess) return nullptr;
        message = "the launch was refused";
    } catch (const emulator::Fault& fault) {
        message = fault.what();
    }
    return message.c_str();
}

enum Type : int64_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Calls `body(T{})`.
template <typename Body>
cudaError_t visit(int64_t type, const Body& body) {
    switch (type) {
        case kFloat32:
            return body(float{});
        case kFloat64:
            return body(double{});
#ifndef DRIVER_FEW_TYPES
        case kFloat16:
            return body(errseg::half{});
        case kBFloat16:
            return body(errseg::bf16{});
#endif
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace driver
