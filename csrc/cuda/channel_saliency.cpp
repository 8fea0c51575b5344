#include "kernels/cuda/channel_saliency.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <vector>

#include "csrc/channel_saliency.h"
#include "csrc/cuda/stream.h"

namespace stamp_fast {
namespace {

Tensor channel_saliency(const Tensor& activation, const Tensor& gradient, int64_t dim) {
  const torch::stable::accelerator::DeviceGuard guard(activation.get_device_index());
  const SaliencyTensors tensors = saliency_tensors(activation, gradient, dim);
  Tensor result = new_saliency(tensors);
  const std::vector<int64_t> bytes = {cuda::channel_saliency_scratch(tensors.input)};
  const Tensor scratch = torch::stable::empty(bytes, ScalarType::Byte, std::nullopt, activation.device());
  STD_CUDA_CHECK(cuda::channel_saliency(tensors.input, scratch.mutable_data_ptr(), result.mutable_data_ptr(),
                                        current_stream(activation)));
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(stamp_fast, CUDA, m) { m.impl("channel_saliency", TORCH_BOX(&channel_saliency)); }

}  // namespace
}  // namespace stamp_fast
