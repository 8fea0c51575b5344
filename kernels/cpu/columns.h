// The kept columns of rows of (outer, cols, inner) elements: taken out of a dense row, put back into one, multiplied.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/pack_weights.h"

namespace stamp_fast::cpu {

// Made once per tensor and read by every thread; keeps a pointer to the item's index.
struct Columns {
  explicit Columns(const PackItem& item);

  int64_t outer, dense_cols, cols, inner;
  const int64_t* index;        // null: all columns
  std::vector<uint64_t> mask;  // a bit per dense column; empty where the index itself is used
  std::vector<char> factors;   // (cols, inner) accumulators of the item's type; empty: one

  int64_t plane() const { return cols * inner; }
  int64_t dense_plane() const { return dense_cols * inner; }
  int64_t row() const { return outer * plane(); }
  int64_t dense_row() const { return outer * dense_plane(); }
};

// While it gathers a row it fetches from `next`, the row that will be gathered after it. (Kept rows lie apart: the
// processor does not see by itself where the next one begins.)
template <typename T>
void gather(const Columns& columns, const T* dense, const T* next, T* packed);

// Writes the whole dense row, zeros where no column is kept.
template <typename T>
void scatter(const Columns& columns, const T* packed, T* dense);

// Multiplies a packed row by the factors, if there are any.
template <typename T>
void multiply(const Columns& columns, T* packed);

// Adds the products of two packed rows to sums of (cols, inner).
template <typename T>
void add_products(const Columns& columns, const T* a, const T* b, accumulator_t<T>* sums);

}  // namespace stamp_fast::cpu
