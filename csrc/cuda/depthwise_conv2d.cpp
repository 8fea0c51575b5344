#include "kernels/cuda/depthwise_conv2d.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <string>
#include <tuple>
#include <vector>

#include "csrc/checks.h"
#include "csrc/cuda/stream.h"
#include "csrc/tensors.h"

namespace stamp_fast {
namespace {

using Sizes = std::vector<int64_t>;

// Sums of a few products of such numbers fit in 64 bits.
constexpr int64_t kMaxNumber = int64_t{1} << 30;
// Positions in an image and in a padded dimension are 32 bits wide.
constexpr int64_t kMaxImage = int64_t{1} << 31;

void check_pair(const char* op, const char* name, const Sizes& values, int64_t least) {
  SF_CHECK(values.size() == 2, op, name, " must have 2 elements, got ", values.size());
  for (size_t i = 0; i < 2; ++i) {
    SF_CHECK(values[i] >= least && values[i] < kMaxNumber, op, item_name(name, i), " must lie in [", least, ", ",
             kMaxNumber, "), got ", values[i]);
  }
}

// Checks the arguments that forward and backward share, and gives the shape of the work.
DepthwiseConv make_conv(const char* op, const Tensor& input, const Tensor& weight, const Sizes& stride,
                        const Sizes& padding, const Sizes& dilation) {
  check_float(op, "input", input);
  SF_CHECK(input.dim() == 4, op, "input must have 4 dimensions, got shape ", shape_text(input));
  check_same_dtype(op, "weight", weight, "input", input);
  check_same_device(op, "weight", weight, "input", input);
  SF_CHECK(weight.dim() == 4 && weight.size(0) == input.size(1) && weight.size(1) == 1 && weight.size(2) >= 1 &&
               weight.size(3) >= 1,
           op, "weight must have shape (", input.size(1), ", 1, height, width), got ", shape_text(weight));
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);

  const bool last = memory_format(input) != MemoryFormat::Contiguous;
  DepthwiseConv conv{.dtype = kernel_dtype(input.scalar_type()),
                     .input = {input.size(0), input.size(1), input.size(2), input.size(3), last},
                     .output = {input.size(0), input.size(1), 0, 0, last},
                     .y = {},
                     .x = {}};
  for (const int64_t i : {0, 1}) {
    const int64_t padded = input.size(2 + i) + 2 * padding[i];
    const int64_t reach = dilation[i] * (weight.size(2 + i) - 1) + 1;
    SF_CHECK(padded < kMaxImage, op, "input must have fewer than 2^31 padded elements along dimension ", 2 + i,
             ", got ", padded);
    SF_CHECK(reach <= padded, op, "weight reaches over ", reach, " elements along dimension ", 2 + i,
             " and must not reach over more than the padded input has, ", padded);
    (i == 0 ? conv.y : conv.x) = {static_cast<int32_t>(weight.size(2 + i)), static_cast<int32_t>(stride[i]),
                                  static_cast<int32_t>(padding[i]), static_cast<int32_t>(dilation[i])};
    (i == 0 ? conv.output.height : conv.output.width) = (padded - reach) / stride[i] + 1;
  }
  for (const auto& [name, batch] : {std::pair{"input", conv.input}, std::pair{"the output", conv.output}}) {
    SF_CHECK(batch.image_size() < kMaxImage, op, name, " must have images of fewer than 2^31 elements, got ",
             batch.image_size());
  }
  return conv;
}

Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, const Sizes& stride, const Sizes& padding,
                        const Sizes& dilation) {
  const DepthwiseConv conv = make_conv("depthwise_conv2d", input, weight, stride, padding, dilation);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const MemoryFormat format = memory_format(input);
  const Tensor dense = torch::stable::contiguous(input, format);
  const Tensor filters = torch::stable::contiguous(weight);
  const ImageBatch& out = conv.output;
  Tensor output = new_empty(input, {out.images, out.channels, out.height, out.width}, format);
  STD_CUDA_CHECK(cuda::depthwise_conv2d(conv, dense.const_data_ptr(), filters.const_data_ptr(),
                                        output.mutable_data_ptr(), current_stream(input)));
  return output;
}

std::tuple<Tensor, Tensor> depthwise_conv2d_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                     const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                                                     const std::vector<bool>& need) {
  constexpr const char* kOp = "depthwise_conv2d_backward";
  const DepthwiseConv conv = make_conv(kOp, input, weight, stride, padding, dilation);
  const ImageBatch& out = conv.output;
  SF_CHECK(grad.dim() == 4 && grad.size(0) == out.images && grad.size(1) == out.channels &&
               grad.size(2) == out.height && grad.size(3) == out.width,
           kOp, "grad must have the shape of the output, (", out.images, ", ", out.channels, ", ", out.height, ", ",
           out.width, "), got ", shape_text(grad));
  check_same_dtype(kOp, "grad", grad, "input", input);
  check_same_device(kOp, "grad", grad, "input", input);
  SF_CHECK(need.size() == 2, kOp, "need must have 2 elements, got ", need.size());

  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const MemoryFormat format = memory_format(input);
  const Tensor dense_grad = torch::stable::contiguous(grad, format);
  Tensor input_grad = new_absent(input), weight_grad = new_absent(weight);
  if (need[0]) {
    const auto sizes = input.sizes();
    const Tensor filters = torch::stable::contiguous(weight);
    input_grad = new_empty(input, {sizes.begin(), sizes.end()}, format);
    STD_CUDA_CHECK(cuda::depthwise_conv2d_backward_input(conv, dense_grad.const_data_ptr(), filters.const_data_ptr(),
                                                         input_grad.mutable_data_ptr(), current_stream(input)));
  }
  if (need[1]) {
    const auto sizes = weight.sizes();
    const Tensor dense = torch::stable::contiguous(input, format);
    const Sizes bytes = {cuda::depthwise_conv2d_backward_weight_scratch(conv)};
    const Tensor scratch = torch::stable::empty(bytes, ScalarType::Byte, std::nullopt, input.device());
    weight_grad = new_empty(weight, {sizes.begin(), sizes.end()}, MemoryFormat::Contiguous);
    STD_CUDA_CHECK(cuda::depthwise_conv2d_backward_weight(conv, dense_grad.const_data_ptr(), dense.const_data_ptr(),
                                                          scratch.mutable_data_ptr(), weight_grad.mutable_data_ptr(),
                                                          current_stream(input)));
  }
  return {input_grad, weight_grad};
}

STABLE_TORCH_LIBRARY_IMPL(stamp_fast, CUDA, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
}

}  // namespace
}  // namespace stamp_fast
