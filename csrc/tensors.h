// What the front ends of all operators need to know of a tensor: its memory format, its element type.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/dtype.h"

namespace stamp_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// True where the dimensions after the first lie in memory as in a dense tensor of this format. Strides of
// dimensions of size 1 count only under `exact`.
inline bool rows_are_dense(const Tensor& tensor, MemoryFormat format, bool exact) {
  int64_t expected = 1;
  const auto matches = [&](int64_t dim) {
    const bool same = tensor.stride(dim) == expected || (!exact && tensor.size(dim) == 1);
    expected *= tensor.size(dim);
    return same;
  };
  const bool channels_last = format != MemoryFormat::Contiguous;
  if (channels_last && !matches(1)) return false;
  for (int64_t dim = tensor.dim() - 1; dim > (channels_last ? 1 : 0); --dim) {
    if (!matches(dim)) return false;
  }
  return true;
}

// The memory format that results keep. Ambiguous strides (1x1 kernels) count as contiguous.
inline MemoryFormat memory_format(const Tensor& tensor) {
  if (tensor.dim() != 4 && tensor.dim() != 5) return MemoryFormat::Contiguous;
  const auto last = tensor.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
  const bool is_last = rows_are_dense(tensor, last, true) && !rows_are_dense(tensor, MemoryFormat::Contiguous, true);
  return is_last ? last : MemoryFormat::Contiguous;
}

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, MemoryFormat format) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

// Stands for "no gradient": autograd turns it into None.
inline Tensor new_absent(const Tensor& like) { return new_empty(like, {0}, MemoryFormat::Contiguous); }

inline DType kernel_dtype(ScalarType dtype) {
  if (dtype == ScalarType::Double) return DType::kFloat64;
  if (dtype == ScalarType::BFloat16) return DType::kBFloat16;
  if (dtype == ScalarType::Half) return DType::kFloat16;
  return DType::kFloat32;
}

}  // namespace stamp_fast
