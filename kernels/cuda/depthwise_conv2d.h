// A convolution with one filter per channel, and its gradients, in a fixed order of sums. Weights are dense
// (channels, filter height, filter width) arrays; sums are taken in accumulator_t.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch.h"
#include "kernels/depthwise_conv2d.h"

namespace stamp_fast::cuda {

cudaError_t depthwise_conv2d(const DepthwiseConv& conv, const void* input, const void* weight, void* output,
                             cudaStream_t stream);

cudaError_t depthwise_conv2d_backward_input(const DepthwiseConv& conv, const void* grad, const void* weight,
                                            void* input_grad, cudaStream_t stream);

// Bytes of scratch that `depthwise_conv2d_backward_weight` needs, to be aligned to 8.
int64_t depthwise_conv2d_backward_weight_scratch(const DepthwiseConv& conv);

cudaError_t depthwise_conv2d_backward_weight(const DepthwiseConv& conv, const void* grad, const void* input,
                                             void* scratch, void* weight_grad, cudaStream_t stream);

}  // namespace stamp_fast::cuda
