// What the CPU and CUDA front ends of pack_weights share: argument checks, and each tensor's shape seen as
// rows of (outer, cols, inner) blocks (kernels/pack_weights.h).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <utility>
#include <vector>

#include "csrc/checks.h"
#include "csrc/tensors.h"
#include "kernels/pack_weights.h"

namespace stamp_fast {

using TensorList = std::vector<Tensor>;

struct PackLayout {
  Tensor dense;                     // every row a dense block
  std::optional<Tensor> row_index;  // contiguous; empty: all
  std::optional<Tensor> col_index;
  std::optional<Tensor> scale;
  MemoryFormat format;  // of the packed tensor and of the gradient
  int64_t dense_rows, dense_cols, rows, cols, outer, inner;
  int64_t dense_row_stride;
  std::vector<int64_t> packed_sizes;

  int64_t dense_row_size() const { return outer * dense_cols * inner; }
  int64_t packed_row_size() const { return outer * cols * inner; }
};

inline std::optional<Tensor> contiguous_or_none(const Tensor& tensor) {
  if (tensor.numel() == 0) return std::nullopt;
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The tensor itself where its rows are dense in this format, else a copy.
inline Tensor with_dense_rows(const Tensor& tensor, MemoryFormat format) {
  if (tensor.dim() == 1 ? tensor.is_contiguous() : rows_are_dense(tensor, format, false)) return tensor;
  return torch::stable::contiguous(tensor, format);
}

inline PackLayout make_layout(const char* op, size_t i, const Tensor& tensor, const Tensor& rows, const Tensor& cols,
                              const Tensor& scale, const Tensor& first) {
  SF_CHECK(tensor.dim() >= 1, op, item_name("tensors", i), " must have at least 1 dimension, got 0");
  check_float(op, item_name("tensors", i), tensor);
  check_same_device(op, item_name("tensors", i), tensor, "tensors[0]", first);

  const std::pair<const char*, const Tensor*> indices[] = {{"rows", &rows}, {"cols", &cols}};
  for (const auto& [name, index] : indices) {
    SF_CHECK(index->dim() == 1, op, item_name(name, i), " must have 1 dimension, got shape ", shape_text(*index));
    SF_CHECK(index->scalar_type() == ScalarType::Long, op, item_name(name, i), " must be int64, got ",
             index->scalar_type());
    check_same_device(op, item_name(name, i), *index, "tensors[0]", first);
  }
  const bool vector = tensor.dim() == 1;
  SF_CHECK(!vector || cols.numel() == 0, op, item_name("cols", i), " must be empty for a tensor of 1 dimension, got ",
           cols.numel(), " indices");

  PackLayout layout;
  layout.format = memory_format(tensor);
  layout.dense = with_dense_rows(tensor, layout.format);
  layout.packed_sizes.assign(tensor.sizes().begin(), tensor.sizes().end());
  if (rows.numel() > 0) layout.packed_sizes[0] = rows.numel();
  if (cols.numel() > 0) layout.packed_sizes[1] = cols.numel();
  int64_t rest = 1;
  for (int64_t d = 2; d < tensor.dim(); ++d) rest *= tensor.size(d);
  const bool channels_last = layout.format != MemoryFormat::Contiguous;
  layout.outer = channels_last ? rest : 1;
  layout.inner = channels_last ? 1 : rest;
  layout.dense_rows = vector ? 1 : tensor.size(0);
  layout.dense_cols = tensor.size(vector ? 0 : 1);
  layout.rows = vector ? 1 : layout.packed_sizes[0];
  layout.cols = layout.packed_sizes[vector ? 0 : 1];
  layout.dense_row_stride = vector ? layout.dense_cols : layout.dense.stride(0);
  layout.col_index = contiguous_or_none(vector ? rows : cols);
  if (!vector) layout.row_index = contiguous_or_none(rows);

  SF_CHECK(scale.dim() == 1, op, item_name("scales", i), " must have 1 dimension, got shape ", shape_text(scale));
  check_same_dtype(op, item_name("scales", i), scale, item_name("tensors", i), tensor);
  SF_CHECK(scale.numel() == 0 || scale.numel() == layout.cols, op, item_name("scales", i), " must have ", layout.cols,
           " elements, one for each packed ", vector ? "row" : "column", ", got ", scale.numel());
  check_same_device(op, item_name("scales", i), scale, "tensors[0]", first);
  layout.scale = contiguous_or_none(scale);
  return layout;
}

inline std::vector<PackLayout> make_layouts(const char* op, const TensorList& tensors, const TensorList& rows,
                                            const TensorList& cols, const TensorList& scales) {
  const std::pair<const char*, size_t> lengths[] = {
      {"rows", rows.size()}, {"cols", cols.size()}, {"scales", scales.size()}};
  for (const auto& [name, length] : lengths) {
    SF_CHECK(length == tensors.size(), op, name, " must have the length of tensors, ", tensors.size(), ", got ",
             length);
  }
  std::vector<PackLayout> layouts;
  layouts.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    layouts.push_back(make_layout(op, i, tensors[i], rows[i], cols[i], scales[i], tensors[0]));
  }
  return layouts;
}

// Checks the gradients and brings each one to the memory format of its tensor.
inline TensorList make_grads(const char* op, const TensorList& grads, const std::vector<PackLayout>& layouts) {
  SF_CHECK(grads.size() == layouts.size(), op, "grads must have the length of tensors, ", layouts.size(), ", got ",
           grads.size());
  TensorList out;
  out.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const auto& layout = layouts[i];
    const auto sizes = grads[i].sizes();
    SF_CHECK(std::vector<int64_t>(sizes.begin(), sizes.end()) == layout.packed_sizes, op, item_name("grads", i),
             " must have the shape of the packed tensor, got ", shape_text(grads[i]));
    check_same_dtype(op, item_name("grads", i), grads[i], item_name("tensors", i), layout.dense);
    check_same_device(op, item_name("grads", i), grads[i], "tensors[0]", layouts[0].dense);
    out.push_back(torch::stable::contiguous(grads[i], layout.format));
  }
  return out;
}

inline void check_needs(const char* op, size_t length, const std::vector<bool>& need_tensors,
                        const std::vector<bool>& need_scales) {
  SF_CHECK(need_tensors.size() == length, op, "need_tensors must have the length of tensors, ", length, ", got ",
           need_tensors.size());
  SF_CHECK(need_scales.size() == length, op, "need_scales must have the length of tensors, ", length, ", got ",
           need_scales.size());
}

inline Tensor new_dense(const PackLayout& layout) {
  const auto sizes = layout.dense.sizes();
  return new_empty(layout.dense, {sizes.begin(), sizes.end()}, layout.format);
}

inline const int64_t* index_pointer(const std::optional<Tensor>& index) {
  return index ? static_cast<const int64_t*>(index->const_data_ptr()) : nullptr;
}

inline PackItem kernel_item(const PackLayout& layout) {
  return {.dtype = kernel_dtype(layout.dense.scalar_type()),
          .dense = layout.dense.const_data_ptr(),
          .dense_row_stride = layout.dense_row_stride,
          .dense_rows = layout.dense_rows,
          .rows = layout.rows,
          .outer = layout.outer,
          .dense_cols = layout.dense_cols,
          .cols = layout.cols,
          .inner = layout.inner,
          .row_index = index_pointer(layout.row_index),
          .col_index = index_pointer(layout.col_index),
          .scale = layout.scale ? layout.scale->const_data_ptr() : nullptr};
}

}  // namespace stamp_fast
