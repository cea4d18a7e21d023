// Every kernel of the library in every type, without torch: a few seconds of nvcc instead of a minute.
#include "class_attention/class_attention.cuh"
#include "class_attention/stream.cuh"
#include "class_votes/class_votes.cuh"
#include "cost_volume/cost_volume.cuh"
#include "depthwise_conv/depthwise_conv.cuh"
#include "spatial_attention/spatial_attention.cuh"
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

template cudaError_t depthwise_conv::run(const Convolution<float>&, cudaStream_t);
template cudaError_t depthwise_conv::run(const Convolution<double>&, cudaStream_t);
template cudaError_t depthwise_conv::run(const Convolution<half>&, cudaStream_t);
template cudaError_t depthwise_conv::run(const Convolution<bf16>&, cudaStream_t);
template cudaError_t depthwise_conv::run(const Gathering<float>&, cudaStream_t);
template cudaError_t depthwise_conv::run(const Gathering<double>&, cudaStream_t);
template cudaError_t depthwise_conv::run(const Gathering<half>&, cudaStream_t);
template cudaError_t depthwise_conv::run(const Gathering<bf16>&, cudaStream_t);

auto* const kept = &class_votes::run;

auto* const kept_classes = &class_attention::forward;
auto* const kept_classes_bwd_mlp = &class_attention::backward_mlp;
auto* const kept_classes_bwd = &class_attention::backward_attention;
auto* const kept_classes_stream = &class_attention::stream_forward;
auto* const kept_classes_stream_bwd = &class_attention::stream_backward;

auto* const kept_costs = &cost_volume::forward;
auto* const kept_costs_pixels = &cost_volume::backward_pixels;
auto* const kept_costs_words = &cost_volume::backward_words;

auto* const kept_spatial = &spatial_attention::forward;
auto* const kept_spatial_bwd = &spatial_attention::backward;
auto* const kept_spatial_windows = &spatial_attention::make_windows;
auto* const kept_spatial_pixels = &spatial_attention::backward_pixels;
auto* const kept_spatial_rows = &spatial_attention::normalize_rows;

}  // namespace errseg
