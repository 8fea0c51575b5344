// One tensor of pack_weights as its kernels see it, on every device.
//
// A dense row is a block of (outer, cols, inner) elements, whatever the tensor's shape:
//   contiguous (O, I, *rest):    outer = 1,             cols = I, inner = prod(rest)
//   channels_last (O, I, *rest): outer = prod(rest),    cols = I, inner = 1
//   vector (O):                  one row of outer = 1,  cols = O, inner = 1
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace stamp_fast {

struct PackItem {
  DType dtype;
  const void* dense;
  int64_t dense_row_stride;  // in elements
  int64_t dense_rows;
  int64_t rows;  // packed
  int64_t outer;
  int64_t dense_cols;
  int64_t cols;  // packed
  int64_t inner;
  const int64_t* row_index;  // null: all rows
  const int64_t* col_index;  // null: all columns
  const void* scale;         // per packed column; null: one
};

}  // namespace stamp_fast
