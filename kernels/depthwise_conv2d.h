// A convolution with one filter per channel, as its kernels see it.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace stamp_fast {

// A dense batch of images, (images, channels, height, width), in memory so or with the channels last. One image has
// fewer than 2^31 elements; the batch may have more.
struct ImageBatch {
  int64_t images;
  int64_t channels;
  int64_t height;
  int64_t width;
  bool channels_last;

  SF_HOST_DEVICE int64_t image_size() const { return channels * height * width; }
  SF_HOST_DEVICE int64_t row_stride() const { return channels_last ? channels * width : width; }
  SF_HOST_DEVICE int64_t column_stride() const { return channels_last ? channels : 1; }

  // Where the plane of a channel begins.
  SF_HOST_DEVICE int64_t plane(int64_t image, int64_t channel) const {
    return image * image_size() + (channels_last ? channel : channel * height * width);
  }
};

struct Place {
  uint32_t channel;
  uint32_t y;
  uint32_t x;
};

// What lies at `offset` of an image.
SF_HOST_DEVICE inline Place place_of(const ImageBatch& batch, uint32_t offset) {
  const auto channels = static_cast<uint32_t>(batch.channels);
  const auto height = static_cast<uint32_t>(batch.height);
  const auto width = static_cast<uint32_t>(batch.width);
  if (batch.channels_last) return {offset % channels, offset / channels / width, offset / channels % width};
  return {offset / width / height, offset / width % height, offset % width};
}

// Along one dimension. The padded input has fewer than 2^31 elements, and the filter fits in it.
struct Window {
  int32_t size;  // of the filter
  int32_t stride;
  int32_t padding;
  int32_t dilation;
};

struct DepthwiseConv {
  DType dtype;
  ImageBatch input;
  ImageBatch output;  // of the input's images, channels and layout
  Window y;
  Window x;
};

}  // namespace stamp_fast
