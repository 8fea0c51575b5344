// Gathers and scales the live part of many tensors, and scatters the gradients back, in a few launches. Item
// tables travel as kernel arguments: no copy to the device, no synchronisation, and CUDA graphs can record
// it.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/launch.h"
#include "kernels/pack_weights.h"

namespace stamp_fast::cuda {

// A row must have fewer elements than this: positions within one are 32 bits wide.
inline constexpr int64_t kMaxRowSize = int64_t{1} << 31;

struct ForwardItem {
  PackItem layout;
  void* packed;
};

struct BackwardItem {
  PackItem layout;
  const void* grad;
  void* dense_grad;  // null: not wanted
  void* scale_grad;  // null: not wanted
  // Set by the launcher, to places in the scratch.
  int32_t* packed_row = nullptr;  // (dense_rows): position among the packed rows, -1 where dead
  int32_t* packed_col = nullptr;  // (dense_cols)
  void* scale_sums = nullptr;     // (parts, cols * inner) accumulators
};

// An index out of range stops the kernel.
cudaError_t pack_weights(const std::vector<ForwardItem>& items, cudaStream_t stream);

// Bytes of scratch that `pack_weights_backward` needs, to be aligned to 8.
int64_t pack_weights_backward_scratch(const std::vector<BackwardItem>& items);

cudaError_t pack_weights_backward(std::vector<BackwardItem> items, void* scratch, cudaStream_t stream);

}  // namespace stamp_fast::cuda
