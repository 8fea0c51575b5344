// Reads an activation and its gradient once and sums up what they say of each channel, in two launches and in a fixed
// order.
#pragma once

#include <cstdint>

#include "kernels/channel_saliency.h"
#include "kernels/cuda/launch.h"

namespace stamp_fast::cuda {

// Bytes of scratch that `channel_saliency` needs, to be aligned to 8.
int64_t channel_saliency_scratch(const SaliencyInput& input);

// Writes (4, channels) accumulator_t of the input's dtype.
cudaError_t channel_saliency(const SaliencyInput& input, void* scratch, void* result, cudaStream_t stream);

}  // namespace stamp_fast::cuda
