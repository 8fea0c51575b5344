#include "csrc/pack_weights.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "csrc/cpu/parallel.h"
#include "kernels/cpu/pack_weights.h"

namespace stamp_fast {
namespace {

using cpu::kGrain;
using cpu::WorkList;

// Bounds the memory for partial sums of the scales' gradients, and keeps a tensor's sum in one order whatever
// the number of threads.
constexpr int64_t kMaxParts = 64;

struct Chunk {
  size_t item;
  int64_t begin, end;
  int64_t part;
};

// With `unique`, repeated indices are errors too: a scatter would lose all but one of their gradients.
void check_index(const char* op, const std::string& name, const std::optional<Tensor>& index, int64_t size,
                 bool unique) {
  if (!index) return;
  const int64_t* values = index_pointer(index);
  std::vector<bool> seen(unique ? static_cast<size_t>(size) : 0);
  for (int64_t j = 0; j < index->numel(); ++j) {
    SF_CHECK(values[j] >= 0 && values[j] < size, op, name, " must lie in [0, ", size, "), got ", values[j],
             " at position ", j);
    if (!unique) continue;
    const auto slot = static_cast<size_t>(values[j]);
    SF_CHECK(!seen[slot], op, name, " must hold each index once, got ", values[j], " again at position ", j);
    seen[slot] = true;
  }
}

void check_indices(const char* op, const std::vector<PackLayout>& layouts, const TensorList& tensors, bool unique) {
  for (size_t i = 0; i < layouts.size(); ++i) {
    const bool vector = tensors[i].dim() == 1;
    check_index(op, item_name("rows", i), layouts[i].row_index, layouts[i].dense_rows, unique);
    check_index(op, item_name(vector ? "rows" : "cols", i), layouts[i].col_index, layouts[i].dense_cols, unique);
  }
}

TensorList pack_weights(const TensorList& tensors, const TensorList& rows, const TensorList& cols,
                        const TensorList& scales) {
  constexpr const char* kOp = "pack_weights";
  const auto layouts = make_layouts(kOp, tensors, rows, cols, scales);
  check_indices(kOp, layouts, tensors, /*unique=*/false);

  TensorList packed;
  std::vector<PackItem> items;
  std::vector<cpu::Columns> columns;
  std::vector<void*> pointers;
  std::vector<Chunk> chunks;
  WorkList work;
  for (size_t i = 0; i < layouts.size(); ++i) {
    const auto& layout = layouts[i];
    packed.push_back(new_empty(layout.dense, layout.packed_sizes, layout.format));
    items.push_back(kernel_item(layout));
    columns.emplace_back(items.back());
    pointers.push_back(packed.back().mutable_data_ptr());
    const int64_t row_size = layout.packed_row_size();
    if (row_size == 0) continue;
    const int64_t step = (kGrain + row_size - 1) / row_size;
    for (int64_t begin = 0; begin < layout.rows; begin += step) {
      const int64_t end = std::min(begin + step, layout.rows);
      chunks.push_back({i, begin, end, 0});
      work.add((end - begin) * row_size);
    }
  }
  work.run([&](int64_t piece) {
    const Chunk& chunk = chunks[piece];
    cpu::pack_weights(items[chunk.item], columns[chunk.item], chunk.begin, chunk.end, pointers[chunk.item]);
  });
  return packed;
}

// Position of every dense row among the packed rows, -1 where it is dead.
std::vector<int64_t> packed_rows(const PackLayout& layout) {
  std::vector<int64_t> position(static_cast<size_t>(layout.dense_rows), -1);
  const int64_t* index = index_pointer(layout.row_index);
  for (int64_t j = 0; j < layout.rows; ++j) position[static_cast<size_t>(index ? index[j] : j)] = j;
  return position;
}

std::tuple<TensorList, TensorList> pack_weights_backward(const TensorList& grads, const TensorList& tensors,
                                                         const TensorList& rows, const TensorList& cols,
                                                         const TensorList& scales,
                                                         const std::vector<bool>& need_tensors,
                                                         const std::vector<bool>& need_scales) {
  constexpr const char* kOp = "pack_weights_backward";
  const auto layouts = make_layouts(kOp, tensors, rows, cols, scales);
  check_indices(kOp, layouts, tensors, /*unique=*/true);
  check_needs(kOp, layouts.size(), need_tensors, need_scales);
  const auto packed_grads = make_grads(kOp, grads, layouts);

  struct Job {
    explicit Job(const PackItem& item) : item(item), columns(item) {}

    PackItem item;
    cpu::Columns columns;
    std::vector<int64_t> packed_row;
    const void* grad = nullptr;
    void* dense_grad = nullptr;
    void* scale_grad = nullptr;
    int64_t parts = 0;
    std::vector<char> sums;  // (parts, cols) accumulators
  };
  TensorList tensor_grads, scale_grads;
  std::vector<Job> jobs;
  std::vector<Chunk> chunks;
  WorkList work, sum_work;
  for (size_t i = 0; i < layouts.size(); ++i) {
    const auto& layout = layouts[i];
    const bool need_scale = need_scales[i] && layout.scale;
    tensor_grads.push_back(need_tensors[i] ? new_dense(layout) : new_absent(layout.dense));
    scale_grads.push_back(need_scale ? new_empty(layout.dense, {layout.cols}, MemoryFormat::Contiguous)
                                     : new_absent(layout.dense));
    Job& job = jobs.emplace_back(kernel_item(layout));
    job.packed_row = packed_rows(layout);
    job.grad = packed_grads[i].const_data_ptr();
    if (need_tensors[i]) job.dense_grad = tensor_grads.back().mutable_data_ptr();
    const int64_t row_size = layout.dense_row_size();
    if ((need_tensors[i] || need_scale) && row_size > 0) {
      const int64_t step =
          std::max((kGrain + row_size - 1) / row_size, (layout.dense_rows + kMaxParts - 1) / kMaxParts);
      for (int64_t begin = 0; begin < layout.dense_rows; begin += step) {
        const int64_t end = std::min(begin + step, layout.dense_rows);
        chunks.push_back({i, begin, end, job.parts++});
        work.add((end - begin) * row_size);
      }
    }
    if (need_scale) {
      job.scale_grad = scale_grads.back().mutable_data_ptr();
      job.sums.resize(static_cast<size_t>(job.parts * layout.cols * accumulator_size(job.item.dtype)));
    }
    sum_work.add(need_scale ? job.parts * layout.cols : 0);
  }
  work.run([&](int64_t piece) {
    const Chunk& chunk = chunks[piece];
    Job& job = jobs[chunk.item];
    void* sum = nullptr;
    if (job.scale_grad) sum = job.sums.data() + job.sums.size() / job.parts * chunk.part;
    cpu::pack_weights_backward(job.item, job.columns, chunk.begin, chunk.end, job.packed_row.data(), job.grad,
                               job.dense_grad, sum);
  });
  sum_work.run([&](int64_t i) {
    Job& job = jobs[i];
    if (!job.scale_grad) return;
    cpu::pack_weights_sum(job.item.dtype, job.parts, job.item.cols, job.sums.data(), job.scale_grad);
  });
  return {std::move(tensor_grads), std::move(scale_grads)};
}

STABLE_TORCH_LIBRARY_IMPL(stamp_fast, CPU, m) {
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("pack_weights_backward", TORCH_BOX(&pack_weights_backward));
}

}  // namespace
}  // namespace stamp_fast
