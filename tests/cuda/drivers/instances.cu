// Every kernel of the library in every type, without torch: a few seconds of nvcc instead of a minute.
#include "class_votes/class_votes.cuh"
#include "upsample_argmax/upsample_argmax.cuh"
#include "upsample_bce/upsample_bce.cuh"

namespace errseg {

template cudaError_t upsample_argmax::run(const Problem<float>&, cudaStream_t);
template cudaError_t upsample_argmax::run(const Problem<double>&, cudaStream_t);
template cudaError_t upsample_argmax::run(const Problem<half>&, cudaStream_t);
template cudaError_t upsample_argmax::run(const Problem<bf16>&, cudaStream_t);

template cudaError_t upsample_bce::run(const Problem<float>&, cudaStream_t);
template cudaError_t upsample_bce::run(const Problem<double>&, cudaStream_t);
template cudaError_t upsample_bce::run(const Problem<half>&, cudaStream_t);
template cudaError_t upsample_bce::run(const Problem<bf16>&, cudaStream_t);

auto* const kept = &class_votes::run;

}  // namespace errseg
