// What the CPU and CUDA front ends of channel_saliency share: argument checks, and the tensors seen as
// (images, outer, channels, inner) arrays (kernels/channel_saliency.h).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "csrc/checks.h"
#include "csrc/tensors.h"
#include "kernels/channel_saliency.h"

namespace stamp_fast {

struct SaliencyTensors {
  Tensor activation, gradient;  // of one memory format
  SaliencyInput input;
};

inline SaliencyTensors saliency_tensors(const Tensor& activation, const Tensor& gradient, int64_t dim) {
  constexpr const char* kOp = "channel_saliency";
  const int64_t dims = activation.dim();
  check_float(kOp, "activation", activation);
  SF_CHECK(dims >= 1, kOp, "activation must have at least 1 dimension, got 0");
  check_same_dtype(kOp, "gradient", gradient, "activation", activation);
  SF_CHECK(same_shape(gradient, activation), kOp, "gradient must have the shape of activation, ",
           shape_text(activation), ", got ", shape_text(gradient));
  check_same_device(kOp, "gradient", gradient, "activation", activation);
  SF_CHECK(dim >= -dims && dim < dims, kOp, "dim must lie in [", -dims, ", ", dims, "), got ", dim);
  if (dim < 0) dim += dims;

  const MemoryFormat format = memory_format(activation);
  SaliencyTensors tensors{.activation = torch::stable::contiguous(activation, format),
                          .gradient = torch::stable::contiguous(gradient, format),
                          .input = {}};
  // Dimensions as they lie in memory.
  std::vector<int64_t> order(static_cast<size_t>(dims));
  std::iota(order.begin(), order.end(), 0);
  if (format != MemoryFormat::Contiguous) std::rotate(order.begin() + 1, order.begin() + 2, order.end());
  const auto place = std::find(order.begin(), order.end(), dim);
  const auto product = [&](auto begin, auto end) {
    return std::accumulate(begin, end, int64_t{1}, [&](int64_t p, int64_t d) { return p * activation.size(d); });
  };
  SaliencyInput& input = tensors.input;
  input = {.dtype = kernel_dtype(activation.scalar_type()),
           .activation = tensors.activation.const_data_ptr(),
           .gradient = tensors.gradient.const_data_ptr(),
           // Along dimension 0 there are no images to tell apart.
           .images = dim == 0 ? 1 : activation.size(0),
           .outer = dim == 0 ? 1 : product(order.begin() + 1, place),
           .channels = activation.size(dim),
           .inner = product(place + 1, order.end())};
  // One channel is one plane in either format; planes are read faster.
  if (input.channels == 1) input.inner *= std::exchange(input.outer, 1);
  return tensors;
}

inline Tensor new_saliency(const SaliencyTensors& tensors) {
  const auto dtype = tensors.input.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const std::vector<int64_t> sizes = {4, tensors.input.channels};
  return torch::stable::empty(sizes, dtype, std::nullopt, tensors.activation.device());
}

}  // namespace stamp_fast
