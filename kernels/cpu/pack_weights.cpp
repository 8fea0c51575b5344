#include "kernels/cpu/pack_weights.h"

#include <algorithm>
#include <cstring>

#include "kernels/dtype.h"

namespace stamp_fast::cpu {
namespace {

// One row of (cols, inner) elements. kInner is `inner` where it is known at compile time, else 0.
template <typename T, int64_t kInner>
void gather_row(const T* dense, const PackItem& item, T* packed) {
  const int64_t inner = kInner > 0 ? kInner : item.inner;
  const T* scale = static_cast<const T*>(item.scale);
  for (int64_t c = 0; c < item.cols; ++c) {
    const T* from = dense + (item.col_index ? item.col_index[c] : c) * inner;
    T* to = packed + c * inner;
    if (scale) {
      const auto factor = widen(scale[c]);
      for (int64_t k = 0; k < inner; ++k) to[k] = narrow<T>(widen(from[k]) * factor);
    } else {
      std::copy_n(from, inner, to);
    }
  }
}

// With one element per column the tests for index and scale would cost more than the work: hoist them.
template <typename T>
void gather_row_single(const T* dense, const PackItem& item, T* packed) {
  const int64_t cols = item.cols;
  const int64_t* index = item.col_index;
  const T* scale = static_cast<const T*>(item.scale);
  if (index && scale) {
    for (int64_t c = 0; c < cols; ++c) packed[c] = narrow<T>(widen(dense[index[c]]) * widen(scale[c]));
  } else if (index) {
    for (int64_t c = 0; c < cols; ++c) packed[c] = dense[index[c]];
  } else {
    for (int64_t c = 0; c < cols; ++c) packed[c] = narrow<T>(widen(dense[c]) * widen(scale[c]));
  }
}

template <typename T>
void pack(const PackItem& item, int64_t begin, int64_t end, T* packed) {
  const int64_t plane = item.cols * item.inner;
  const int64_t dense_plane = item.dense_cols * item.inner;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t dense_row = item.row_index ? item.row_index[row] : row;
    const T* from = static_cast<const T*>(item.dense) + dense_row * item.dense_row_stride;
    T* to = packed + row * item.outer * plane;
    if (!item.col_index && !item.scale) {
      std::memcpy(to, from, static_cast<size_t>(item.outer * plane) * sizeof(T));
      continue;
    }
    for (int64_t m = 0; m < item.outer; ++m, from += dense_plane, to += plane) {
      if (item.inner == 1) {
        gather_row_single(from, item, to);
      } else if (item.inner == 9) {
        gather_row<T, 9>(from, item, to);
      } else {
        gather_row<T, 0>(from, item, to);
      }
    }
  }
}

// The row's part of the gradient with respect to the scale: sum over `inner` of grad * dense.
template <typename T, int64_t kInner>
void add_scale_grad(const T* grad, const T* dense, const PackItem& item, accumulator_t<T>* sum) {
  const int64_t inner = kInner > 0 ? kInner : item.inner;
  for (int64_t c = 0; c < item.cols; ++c) {
    const T* from = dense + (item.col_index ? item.col_index[c] : c) * inner;
    accumulator_t<T> total = 0;
    for (int64_t k = 0; k < inner; ++k) total += widen(grad[c * inner + k]) * widen(from[k]);
    sum[c] += total;
  }
}

template <typename T, int64_t kInner>
void scatter_row(const T* grad, const PackItem& item, T* dense_grad) {
  const int64_t inner = kInner > 0 ? kInner : item.inner;
  const T* scale = static_cast<const T*>(item.scale);
  for (int64_t c = 0; c < item.cols; ++c) {
    T* to = dense_grad + (item.col_index ? item.col_index[c] : c) * inner;
    const T* from = grad + c * inner;
    if (scale) {
      const auto factor = widen(scale[c]);
      for (int64_t k = 0; k < inner; ++k) to[k] = narrow<T>(widen(from[k]) * factor);
    } else {
      std::copy_n(from, inner, to);
    }
  }
}

template <typename T, int64_t kInner>
void backward(const PackItem& item, int64_t begin, int64_t end, const int64_t* packed_row, const T* grad, T* dense_grad,
              accumulator_t<T>* scale_sum) {
  const int64_t plane = item.cols * item.inner;
  const int64_t dense_plane = item.dense_cols * item.inner;
  for (int64_t row = begin; row < end; ++row) {
    T* to = dense_grad ? dense_grad + row * item.outer * dense_plane : nullptr;
    const bool alive = packed_row[row] >= 0;
    // All bits zero is 0.0 in every type here.
    if (to && (!alive || item.col_index)) {
      std::memset(static_cast<void*>(to), 0, static_cast<size_t>(item.outer * dense_plane) * sizeof(T));
    }
    if (!alive) continue;
    const T* from = static_cast<const T*>(item.dense) + row * item.dense_row_stride;
    const T* row_grad = grad + packed_row[row] * item.outer * plane;
    for (int64_t m = 0; m < item.outer; ++m) {
      if (to) scatter_row<T, kInner>(row_grad + m * plane, item, to + m * dense_plane);
      if (scale_sum) add_scale_grad<T, kInner>(row_grad + m * plane, from + m * dense_plane, item, scale_sum);
    }
  }
}

}  // namespace

void pack_weights(const PackItem& item, int64_t begin, int64_t end, void* packed) {
  with_type(item.dtype, [&]<typename T>(T) { pack<T>(item, begin, end, static_cast<T*>(packed)); });
}

void pack_weights_backward(const PackItem& item, int64_t begin, int64_t end, const int64_t* packed_row,
                           const void* grad, void* dense_grad, void* scale_sum) {
  with_type(item.dtype, [&]<typename T>(T) {
    const auto run = item.inner == 1 ? backward<T, 1> : item.inner == 9 ? backward<T, 9> : backward<T, 0>;
    run(item, begin, end, packed_row, static_cast<const T*>(grad), static_cast<T*>(dense_grad),
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
