// Every operator of the library, one line each. csrc/<device>/<op>.cpp implements it, stamp_fast/ops/<op>.py
// adds the fake kernel and autograd.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(stamp_fast, m) {
  m.def("channel_saliency(Tensor activation, Tensor gradient, int dim) -> Tensor");
  m.def(
      "depthwise_conv2d(Tensor input, Tensor weight, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation) -> "
      "Tensor");
  m.def(
      "depthwise_conv2d_backward(Tensor grad, Tensor input, Tensor weight, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, bool[2] need) -> (Tensor, Tensor)");
  m.def("pack_weights(Tensor[] tensors, Tensor[] rows, Tensor[] cols, Tensor[] scales) -> Tensor[]");
  m.def(
      "pack_weights_backward(Tensor[] grads, Tensor[] tensors, Tensor[] rows, Tensor[] cols, Tensor[] scales, "
      "bool[] need_tensors, bool[] need_scales) -> (Tensor[], Tensor[])");
  // stamp_fast/ops: Triton, or packed weights and torch's own convolution
  m.def(
      "masked_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? rows, Tensor? cols, Tensor? scale, "
      "Tensor? norm_scale, Tensor? norm_shift, Tensor? residual, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, bool statistics, str backend) -> (Tensor, Tensor)");
  m.def(
      "masked_conv2d_backward(Tensor grad, Tensor? grad_statistics, Tensor? output, Tensor input, Tensor weight, "
      "Tensor? rows, Tensor? cols, Tensor? scale, Tensor? norm_scale, Tensor? norm_shift, SymInt[] stride, "
      "SymInt[] padding, SymInt[] dilation, SymInt groups, bool[] need, str backend) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  m.def("norm_relu(Tensor input, Tensor scale, Tensor shift, Tensor? residual, str backend) -> Tensor");
  m.def(
      "norm_relu_backward(Tensor grad, Tensor output, Tensor input, Tensor scale, bool residual, str backend) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}
