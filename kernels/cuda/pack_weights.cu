#include <algorithm>

#include "kernels/cuda/block.h"
#include "kernels/cuda/pack_weights.h"
#include "kernels/dtype.h"

namespace stamp_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kElementsPerBlock = 2048;
// Rows that one thread adds up for the gradient of a scale, and the most parts that a tensor is cut into.
constexpr int64_t kRowsPerPart = 32;
constexpr int64_t kMaxParts = 64;
// Kernel arguments are limited to 4 kB on older toolkits.
constexpr int64_t kArgumentBytes = 4000;

template <typename Item>
struct Batch {
  static constexpr int kItems = static_cast<int>((kArgumentBytes - 8) / (sizeof(Item) + sizeof(uint32_t)));
  Item items[kItems];
  uint32_t first_block[kItems + 1];
  int count;
};

// The item that this block works on, and the block's place among the blocks of that item.
template <typename Item>
__device__ const Item& find_item(const Batch<Item>& batch, uint32_t* block) {
  int i = 0;
  while (i + 1 < batch.count && batch.first_block[i + 1] <= blockIdx.x) ++i;
  *block = blockIdx.x - batch.first_block[i];
  return batch.items[i];
}

// Launches `kernel` over all items, as many at a time as fit; blocks_of(item) may be 0.
template <typename Item, typename BlocksOf>
cudaError_t launch_batches(void (*kernel)(Batch<Item>), const std::vector<Item>& items, const BlocksOf& blocks_of,
                           cudaStream_t stream) {
  Batch<Item> batch{};
  for (size_t i = 0; i < items.size(); ++i) {
    const int64_t blocks = blocks_of(items[i]);
    if (blocks > 0) {
      batch.items[batch.count] = items[i];
      batch.first_block[batch.count + 1] = batch.first_block[batch.count] + static_cast<uint32_t>(blocks);
      ++batch.count;
    }
    if (batch.count == Batch<Item>::kItems || (i + 1 == items.size() && batch.count > 0)) {
      const cudaError_t status = launch(kernel, batch.first_block[batch.count], kThreads, stream, batch);
      if (status != cudaSuccess) return status;
      batch.count = 0;
    }
  }
  return cudaSuccess;
}

int64_t blocks_for(int64_t elements) { return (elements + kElementsPerBlock - 1) / kElementsPerBlock; }

__device__ int64_t checked(const int64_t* index, int64_t position, int64_t size) {
  const int64_t value = index ? index[position] : position;
  if (value < 0 || value >= size) SF_TRAP();
  return value;
}

template <typename T>
__device__ auto scale_of(const PackItem& layout, int64_t col) {
  return layout.scale ? widen(static_cast<const T*>(layout.scale)[col]) : accumulator_t<T>{1};
}

template <typename T>
__device__ void pack_block(const ForwardItem& item, uint32_t block) {
  const PackItem& layout = item.layout;
  const auto inner = static_cast<uint32_t>(layout.inner);
  const auto plane = static_cast<uint32_t>(layout.cols) * inner;
  const int64_t row_size = layout.outer * plane;
  for_elements(block, kElementsPerBlock, layout.rows, row_size, [&](int64_t row, uint32_t offset) {
    const uint32_t m = offset / plane;
    const uint32_t within = offset % plane;
    const uint32_t col = within / inner;
    const int64_t dense_row = checked(layout.row_index, row, layout.dense_rows);
    const int64_t dense_col = checked(layout.col_index, col, layout.dense_cols);
    const int64_t from =
        dense_row * layout.dense_row_stride + (m * layout.dense_cols + dense_col) * layout.inner + within % inner;
    const T value = static_cast<const T*>(layout.dense)[from];
    static_cast<T*>(item.packed)[row * row_size + offset] =
        layout.scale ? narrow<T>(widen(value) * scale_of<T>(layout, col)) : value;
  });
}

__global__ void pack_kernel(const __grid_constant__ Batch<ForwardItem> batch) {
  uint32_t block;
  const ForwardItem& item = find_item(batch, &block);
  with_type(item.layout.dtype, [&]<typename T>(T) { pack_block<T>(item, block); });
}

// Writes where each dense row and column lies in the packed tensor; the dead keep -1.
__global__ void invert_kernel(const __grid_constant__ Batch<BackwardItem> batch) {
  uint32_t block;
  const BackwardItem& item = find_item(batch, &block);
  const PackItem& layout = item.layout;
  for_elements(block, kElementsPerBlock, 1, layout.rows + layout.cols, [&](int64_t, uint32_t offset) {
    if (offset < layout.rows) {
      item.packed_row[checked(layout.row_index, offset, layout.dense_rows)] = static_cast<int32_t>(offset);
    } else {
      const auto col = static_cast<int32_t>(offset - layout.rows);
      item.packed_col[checked(layout.col_index, col, layout.dense_cols)] = col;
    }
  });
}

template <typename T>
__device__ void scatter_block(const BackwardItem& item, uint32_t block) {
  const PackItem& layout = item.layout;
  const auto inner = static_cast<uint32_t>(layout.inner);
  const auto dense_plane = static_cast<uint32_t>(layout.dense_cols) * inner;
  const int64_t row_size = layout.outer * dense_plane;
  for_elements(block, kElementsPerBlock, layout.dense_rows, row_size, [&](int64_t dense_row, uint32_t offset) {
    const uint32_t m = offset / dense_plane;
    const uint32_t within = offset % dense_plane;
    const int64_t row = item.packed_row[dense_row];
    const int64_t col = item.packed_col[within / inner];
    T value = narrow<T>(0);
    if (row >= 0 && col >= 0) {
      const int64_t from = ((row * layout.outer + m) * layout.cols + col) * layout.inner + within % inner;
      value = static_cast<const T*>(item.grad)[from];
      if (layout.scale) value = narrow<T>(widen(value) * scale_of<T>(layout, col));
    }
    static_cast<T*>(item.dense_grad)[dense_row * row_size + offset] = value;
  });
}

__global__ void scatter_kernel(const __grid_constant__ Batch<BackwardItem> batch) {
  uint32_t block;
  const BackwardItem& item = find_item(batch, &block);
  with_type(item.layout.dtype, [&]<typename T>(T) { scatter_block<T>(item, block); });
}

SF_HOST_DEVICE int64_t rows_per_part(const PackItem& layout) {
  const int64_t rows = (layout.rows + kMaxParts - 1) / kMaxParts;
  return rows > kRowsPerPart ? rows : kRowsPerPart;
}

SF_HOST_DEVICE int64_t parts_of(const PackItem& layout) {
  return (layout.rows + rows_per_part(layout) - 1) / rows_per_part(layout);
}

// Each thread adds grad * dense over one part of the rows, for one (column, inner) position: neighbouring
// threads read neighbouring elements, and the order of the sum is fixed.
template <typename T>
__device__ void scale_sums_block(const BackwardItem& item, uint32_t block) {
  const PackItem& layout = item.layout;
  const int64_t plane = layout.cols * layout.inner;
  const int64_t step = rows_per_part(layout);
  for_elements(block, kElementsPerBlock, parts_of(layout), plane, [&](int64_t part, uint32_t offset) {
    const int64_t col = offset / layout.inner;
    const int64_t dense_col = checked(layout.col_index, col, layout.dense_cols);
    const int64_t dense_offset = dense_col * layout.inner + offset % layout.inner;
    const int64_t end = (part + 1) * step < layout.rows ? (part + 1) * step : layout.rows;
    accumulator_t<T> total = 0;
    for (int64_t row = part * step; row < end; ++row) {
      const int64_t dense_row = checked(layout.row_index, row, layout.dense_rows);
      const T* grad = static_cast<const T*>(item.grad) + row * layout.outer * plane + offset;
      const T* dense = static_cast<const T*>(layout.dense) + dense_row * layout.dense_row_stride + dense_offset;
      for (int64_t m = 0; m < layout.outer; ++m) {
        total += widen(grad[m * plane]) * widen(dense[m * layout.dense_cols * layout.inner]);
      }
    }
    static_cast<accumulator_t<T>*>(item.scale_sums)[part * plane + offset] = total;
  });
}

__global__ void scale_sums_kernel(const __grid_constant__ Batch<BackwardItem> batch) {
  uint32_t block;
  const BackwardItem& item = find_item(batch, &block);
  with_type(item.layout.dtype, [&]<typename T>(T) { scale_sums_block<T>(item, block); });
}

template <typename T>
__device__ void scale_grad_block(const BackwardItem& item, uint32_t block) {
  const PackItem& layout = item.layout;
  const auto* sums = static_cast<const accumulator_t<T>*>(item.scale_sums);
  for_elements(block, kElementsPerBlock, 1, layout.cols, [&](int64_t, uint32_t col) {
    accumulator_t<T> total = 0;
    for (int64_t part = 0; part < parts_of(layout); ++part) {
      for (int64_t k = 0; k < layout.inner; ++k) total += sums[(part * layout.cols + col) * layout.inner + k];
    }
    static_cast<T*>(item.scale_grad)[col] = narrow<T>(total);
  });
}

__global__ void scale_grad_kernel(const __grid_constant__ Batch<BackwardItem> batch) {
  uint32_t block;
  const BackwardItem& item = find_item(batch, &block);
  with_type(item.layout.dtype, [&]<typename T>(T) { scale_grad_block<T>(item, block); });
}

int64_t aligned(int64_t bytes) { return (bytes + 7) / 8 * 8; }

int64_t index_bytes(const BackwardItem& item) {
  if (!item.dense_grad) return 0;
  return aligned((item.layout.dense_rows + item.layout.dense_cols) * static_cast<int64_t>(sizeof(int32_t)));
}

int64_t sum_bytes(const BackwardItem& item) {
  if (!item.scale_grad) return 0;
  const PackItem& layout = item.layout;
  return aligned(parts_of(layout) * layout.cols * layout.inner * accumulator_size(layout.dtype));
}

}  // namespace

cudaError_t pack_weights(const std::vector<ForwardItem>& items, cudaStream_t stream) {
  return launch_batches(
      pack_kernel, items,
      [](const ForwardItem& item) {
        return blocks_for(item.layout.rows * item.layout.outer * item.layout.cols * item.layout.inner);
      },
      stream);
}

int64_t pack_weights_backward_scratch(const std::vector<BackwardItem>& items) {
  int64_t bytes = 0;
  for (const auto& item : items) bytes += index_bytes(item) + sum_bytes(item);
  return bytes;
}

cudaError_t pack_weights_backward(std::vector<BackwardItem> items, void* scratch, cudaStream_t stream) {
  // The index tables of all items come first, so that one memset sets them to -1.
  char* next = static_cast<char*>(scratch);
  for (auto& item : items) {
    item.packed_row = reinterpret_cast<int32_t*>(next);
    item.packed_col = item.packed_row + item.layout.dense_rows;
    next += index_bytes(item);
  }
  const auto table_bytes = static_cast<size_t>(next - static_cast<char*>(scratch));
  for (auto& item : items) {
    item.scale_sums = next;
    next += sum_bytes(item);
  }
  cudaError_t status = cudaSuccess;
  const auto run = [&](void (*kernel)(Batch<BackwardItem>), const auto& elements) {
    if (status != cudaSuccess) return;
    status = launch_batches(
        kernel, items, [&](const BackwardItem& item) { return blocks_for(elements(item, item.layout)); }, stream);
  };
  if (table_bytes > 0) status = cudaMemsetAsync(scratch, 0xff, table_bytes, stream);
  run(invert_kernel,
      [](const BackwardItem& item, const PackItem& layout) { return item.dense_grad ? layout.rows + layout.cols : 0; });
  run(scatter_kernel, [](const BackwardItem& item, const PackItem& layout) {
    return item.dense_grad ? layout.dense_rows * layout.outer * layout.dense_cols * layout.inner : 0;
  });
  run(scale_sums_kernel, [](const BackwardItem& item, const PackItem& layout) {
    return item.scale_grad ? parts_of(layout) * layout.cols * layout.inner : 0;
  });
  run(scale_grad_kernel,
      [](const BackwardItem& item, const PackItem& layout) { return item.scale_grad ? layout.cols : 0; });
  return status;
}

}  // namespace stamp_fast::cuda
