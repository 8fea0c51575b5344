// An activation and its gradient as the kernels of channel_saliency see them, on every device.
//
// Both are dense (images, outer, channels, inner) arrays, whatever the tensors' shape:
//   contiguous (N, C, *rest):    outer = 1,          inner = prod(rest)
//   channels_last (N, C, *rest): outer = prod(rest), inner = 1
// A result has four rows of `channels` elements: taylor, fisher, mean, zero fraction.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace stamp_fast {

struct SaliencyInput {
  DType dtype;
  const void* activation;
  const void* gradient;
  int64_t images;
  int64_t outer;
  int64_t channels;
  int64_t inner;

  SF_HOST_DEVICE int64_t positions() const { return outer * inner; }

  SF_HOST_DEVICE int64_t offset(int64_t image, int64_t channel, int64_t position) const {
    if (outer == 1) return (image * channels + channel) * inner + position;
    if (inner == 1) return (image * outer + position) * channels + channel;
    return ((image * outer + position / inner) * channels + channel) * inner + position % inner;
  }
};

}  // namespace stamp_fast
