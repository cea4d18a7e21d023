// Exits with 0 when a launch that is refused leaves no error behind, which the next launch would report.
#include "common/device.cuh"

__global__ void nothing() {}

int main() {
    const cudaError_t error = errseg::launch(nothing, 1, 1, size_t(1) << 30, nullptr);
    return error == cudaSuccess || cudaPeekAtLastError() != cudaSuccess;
}
