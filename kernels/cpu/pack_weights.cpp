#include "kernels/cpu/pack_weights.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/dtype.h"

namespace stamp_fast::cpu {
namespace {

template <typename T>
void pack(const PackItem& item, const Columns& columns, int64_t begin, int64_t end, T* packed) {
  const auto dense_row = [&](int64_t row) {
    return static_cast<const T*>(item.dense) + (item.row_index ? item.row_index[row] : row) * item.dense_row_stride;
  };
  for (int64_t row = begin; row < end; ++row) {
    T* to = packed + row * columns.row();
    gather(columns, dense_row(row), dense_row(std::min(row + 1, end - 1)), to);
    multiply(columns, to);
  }
}

template <typename T>
void backward(const PackItem& item, const Columns& columns, int64_t begin, int64_t end, const int64_t* packed_row,
              const T* grad, T* dense_grad, accumulator_t<T>* scale_sum) {
  const int64_t row_size = columns.row(), dense_row_size = columns.dense_row();
  std::vector<T> live(static_cast<size_t>(item.scale ? row_size : 0));
  std::vector<accumulator_t<T>> sums(static_cast<size_t>(scale_sum ? columns.plane() : 0));
  for (int64_t row = begin; row < end; ++row) {
    T* to = dense_grad ? dense_grad + row * dense_row_size : nullptr;
    if (packed_row[row] < 0) {
      // All bits zero is 0.0 in every type here.
      if (to) std::memset(static_cast<void*>(to), 0, static_cast<size_t>(dense_row_size) * sizeof(T));
      continue;
    }
    const T* row_grad = grad + packed_row[row] * row_size;
    if (scale_sum) {
      const T* dense = static_cast<const T*>(item.dense);
      int64_t next = row + 1;
      while (next < end && packed_row[next] < 0) ++next;
      if (next == end) next = row;
      gather(columns, dense + row * item.dense_row_stride, dense + next * item.dense_row_stride, live.data());
      add_products(columns, row_grad, live.data(), sums.data());
    }
    if (!to) continue;
    if (item.scale) {
      std::copy_n(row_grad, row_size, live.data());
      multiply(columns, live.data());
      row_grad = live.data();
    }
    scatter(columns, row_grad, to);
  }
  if (!scale_sum) return;
  const accumulator_t<T>* from = sums.data();
  for (int64_t c = 0; c < item.cols; ++c) {
    for (int64_t k = 0; k < item.inner; ++k) scale_sum[c] += *from++;
  }
}

}  // namespace

void pack_weights(const PackItem& item, const Columns& columns, int64_t begin, int64_t end, void* packed) {
  with_type(item.dtype, [&]<typename T>(T) { pack<T>(item, columns, begin, end, static_cast<T*>(packed)); });
}

void pack_weights_backward(const PackItem& item, const Columns& columns, int64_t begin, int64_t end,
                           const int64_t* packed_row, const void* grad, void* dense_grad, void* scale_sum) {
  with_type(item.dtype, [&]<typename T>(T) {
    backward<T>(item, columns, begin, end, packed_row, static_cast<const T*>(grad), static_cast<T*>(dense_grad),
                static_cast<accumulator_t<T>*>(scale_sum));
  });
}

void pack_weights_sum(DType dtype, int64_t parts, int64_t cols, const void* scale_sums, void* scale_grad) {
  with_type(dtype, [&]<typename T>(T) {
    const auto* sums = static_cast<const accumulator_t<T>*>(scale_sums);
    auto* out = static_cast<T*>(scale_grad);
    for (int64_t c = 0; c < cols; ++c) {
      accumulator_t<T> total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums[part * cols + c];
      out[c] = narrow<T>(total);
    }
  });
}

}  // namespace stamp_fast::cpu
