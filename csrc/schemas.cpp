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
}
