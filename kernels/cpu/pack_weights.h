// Gathers and scales the live part of one tensor, and scatters the gradient back.
#pragma once

#include <cstdint>

#include "kernels/cpu/columns.h"
#include "kernels/pack_weights.h"

namespace stamp_fast::cpu {

// Writes the packed rows [begin, end) of `packed`, which is dense.
void pack_weights(const PackItem& item, const Columns& columns, int64_t begin, int64_t end, void* packed);

// Handles the dense rows [begin, end). `packed_row[row]` is the position of a dense row in `grad`, or -1
// where it is dead. Writes the gradient of these rows to `dense_grad` (dense rows, zeros where dead) and adds
// sum(grad * dense) to `scale_sum`, one accumulator_t per packed column. Either may be null.
void pack_weights_backward(const PackItem& item, const Columns& columns, int64_t begin, int64_t end,
                           const int64_t* packed_row, const void* grad, void* dense_grad, void* scale_sum);

// Adds `parts` vectors of accumulators, `cols` long, and writes the sum in `dtype`.
void pack_weights_sum(DType dtype, int64_t parts, int64_t cols, const void* scale_sums, void* scale_grad);

}  // namespace stamp_fast::cpu
