#include "csrc/pack_weights.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "csrc/cuda/stream.h"
#include "kernels/cuda/pack_weights.h"

namespace stamp_fast {
namespace {

void check_row_size(const char* op, size_t i, int64_t size) {
  SF_CHECK(size < cuda::kMaxRowSize, op, item_name("tensors", i), " must have rows of fewer than 2^31 elements, got ",
           size);
}

TensorList pack_weights(const TensorList& tensors, const TensorList& rows, const TensorList& cols,
                        const TensorList& scales) {
  constexpr const char* kOp = "pack_weights";
  if (tensors.empty()) return {};
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  const auto layouts = make_layouts(kOp, tensors, rows, cols, scales);
  TensorList packed;
  std::vector<cuda::ForwardItem> items;
  for (size_t i = 0; i < layouts.size(); ++i) {
    check_row_size(kOp, i, layouts[i].dense_row_size());
    packed.push_back(new_empty(layouts[i].dense, layouts[i].packed_sizes, layouts[i].format));
    items.push_back({kernel_item(layouts[i]), packed.back().mutable_data_ptr()});
  }
  STD_CUDA_CHECK(cuda::pack_weights(items, current_stream(tensors[0])));
  return packed;
}

std::tuple<TensorList, TensorList> pack_weights_backward(const TensorList& grads, const TensorList& tensors,
                                                         const TensorList& rows, const TensorList& cols,
                                                         const TensorList& scales,
                                                         const std::vector<bool>& need_tensors,
                                                         const std::vector<bool>& need_scales) {
  constexpr const char* kOp = "pack_weights_backward";
  if (tensors.empty()) return {};
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  const auto layouts = make_layouts(kOp, tensors, rows, cols, scales);
  check_needs(kOp, layouts.size(), need_tensors, need_scales);
  const auto packed_grads = make_grads(kOp, grads, layouts);
  TensorList tensor_grads, scale_grads;
  std::vector<cuda::BackwardItem> items;
  for (size_t i = 0; i < layouts.size(); ++i) {
    const auto& layout = layouts[i];
    check_row_size(kOp, i, layout.dense_row_size());
    const bool need_scale = need_scales[i] && layout.scale;
    tensor_grads.push_back(need_tensors[i] ? new_dense(layout) : new_absent(layout.dense));
    scale_grads.push_back(need_scale ? new_empty(layout.dense, {layout.cols}, MemoryFormat::Contiguous)
                                     : new_absent(layout.dense));
    items.push_back({.layout = kernel_item(layout),
                     .grad = packed_grads[i].const_data_ptr(),
                     .dense_grad = need_tensors[i] ? tensor_grads.back().mutable_data_ptr() : nullptr,
                     .scale_grad = need_scale ? scale_grads.back().mutable_data_ptr() : nullptr});
  }
  const std::vector<int64_t> bytes = {cuda::pack_weights_backward_scratch(items)};
  const Tensor scratch = torch::stable::empty(bytes, ScalarType::Byte, std::nullopt, tensors[0].device());
  STD_CUDA_CHECK(cuda::pack_weights_backward(std::move(items), scratch.mutable_data_ptr(), current_stream(tensors[0])));
  return {std::move(tensor_grads), std::move(scale_grads)};
}

STABLE_TORCH_LIBRARY_IMPL(stamp_fast, CUDA, m) {
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("pack_weights_backward", TORCH_BOX(&pack_weights_backward));
}

}  // namespace
}  // namespace stamp_fast
