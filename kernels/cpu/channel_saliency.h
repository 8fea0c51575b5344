// Reads an activation and its gradient once and sums up what they say of each channel.
#pragma once

#include <cstdint>

#include "kernels/channel_saliency.h"

namespace stamp_fast::cpu {

// Sums over images [image_begin, image_end) for channels [channel_begin, channel_end). Writes these columns of
// `sums`, (4, channels) doubles: sum of |s| and of s^2 over the images, where s is the sum of activation * gradient
// over an image's positions; sum of the activation; count of its zeros.
void channel_saliency(const SaliencyInput& input, int64_t image_begin, int64_t image_end, int64_t channel_begin,
                      int64_t channel_end, double* sums);

// Adds `parts` such arrays and writes the result, (4, channels) accumulator_t of the input's dtype.
void channel_saliency_finish(const SaliencyInput& input, int64_t parts, const double* sums, void* result);

}  // namespace stamp_fast::cpu
