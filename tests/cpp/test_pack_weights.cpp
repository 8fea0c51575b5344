// The CUDA kernels, run on the host, against the CPU kernels, and both against a plain loop.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cpu/pack_weights.h"
#include "kernels/cuda/pack_weights.h"
#include "tests/cpp/check.h"
#include "tests/cpp/values.h"

namespace {

using stamp_fast::accumulator_t;
using stamp_fast::DType;
using stamp_fast::narrow;
using stamp_fast::PackItem;
using stamp_fast::widen;

bool ascending = false;  // the kept positions; some kernels take these otherwise

std::vector<int64_t> random_index(int64_t size, int64_t kept) {
  std::vector<int64_t> index(static_cast<size_t>(size));
  std::iota(index.begin(), index.end(), 0);
  std::shuffle(index.begin(), index.end(), generator);
  index.resize(static_cast<size_t>(kept));
  if (ascending) std::sort(index.begin(), index.end());
  return index;
}

template <typename T>
struct Problem {
  std::vector<T> dense, scale, grad;
  std::vector<int64_t> row_index, col_index;
  PackItem item;

  // kept_rows or kept_cols 0: all.
  Problem(int64_t dense_rows, int64_t kept_rows, int64_t outer, int64_t dense_cols, int64_t kept_cols, int64_t inner,
          bool scaled, int64_t padding = 0) {
    row_index = random_index(dense_rows, kept_rows);
    col_index = random_index(dense_cols, kept_cols);
    item = {.dtype = dtype_of<T>(),
            .dense = nullptr,
            .dense_row_stride = outer * dense_cols * inner + padding,
            .dense_rows = dense_rows,
            .rows = kept_rows ? kept_rows : dense_rows,
            .outer = outer,
            .dense_cols = dense_cols,
            .cols = kept_cols ? kept_cols : dense_cols,
            .inner = inner,
            .row_index = kept_rows ? row_index.data() : nullptr,
            .col_index = kept_cols ? col_index.data() : nullptr,
            .scale = nullptr};
    dense = random_values<T>(dense_rows * item.dense_row_stride);
    item.dense = dense.data();
    grad = random_values<T>(packed_size());
    if (scaled) {
      scale = random_values<T>(item.cols);
      item.scale = scale.data();
    }
  }

  Problem(const Problem&) = delete;

  int64_t packed_size() const { return item.rows * item.outer * item.cols * item.inner; }
  int64_t dense_size() const { return item.dense_rows * item.outer * item.dense_cols * item.inner; }

  // Calls function(position in packed, position in `dense`, position in a dense gradient, column).
  template <typename Function>
  void each(const Function& function) const {
    int64_t packed = 0;
    for (int64_t r = 0; r < item.rows; ++r) {
      const int64_t row = item.row_index ? item.row_index[r] : r;
      for (int64_t m = 0; m < item.outer; ++m) {
        for (int64_t c = 0; c < item.cols; ++c) {
          const int64_t col = item.col_index ? item.col_index[c] : c;
          for (int64_t k = 0; k < item.inner; ++k) {
            const int64_t offset = (m * item.dense_cols + col) * item.inner + k;
            const int64_t row_size = item.outer * item.dense_cols * item.inner;
            function(packed++, row * item.dense_row_stride + offset, row * row_size + offset, c);
          }
        }
      }
    }
  }
};

template <typename T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(widen(a[i]) == widen(b[i]))) return false;
  }
  return a.size() == b.size();
}

template <typename T>
void check(const std::vector<Problem<T>*>& problems) {
  const T poison = narrow<T>(std::nanf(""));
  std::vector<std::vector<T>> packed, dense_grad, scale_grad;
  std::vector<stamp_fast::cuda::ForwardItem> forward;
  std::vector<stamp_fast::cuda::BackwardItem> backward;
  for (const auto* problem : problems) {
    packed.emplace_back(problem->packed_size(), poison);
    dense_grad.emplace_back(problem->dense_size(), poison);
    scale_grad.emplace_back(problem->scale.size(), poison);
    forward.push_back({problem->item, packed.back().data()});
    backward.push_back({.layout = problem->item,
                        .grad = problem->grad.data(),
                        .dense_grad = dense_grad.back().data(),
                        .scale_grad = problem->scale.empty() ? nullptr : scale_grad.back().data()});
  }
  CHECK(stamp_fast::cuda::pack_weights(forward, nullptr) == cudaSuccess);
  std::vector<double> scratch(stamp_fast::cuda::pack_weights_backward_scratch(backward) / 8, std::nan(""));
  CHECK(stamp_fast::cuda::pack_weights_backward(backward, scratch.data(), nullptr) == cudaSuccess);

  for (size_t i = 0; i < problems.size(); ++i) {
    const Problem<T>& problem = *problems[i];
    const PackItem& item = problem.item;
    std::vector<T> wanted(packed[i].size()), wanted_dense(dense_grad[i].size(), narrow<T>(0));
    std::vector<double> wanted_scale(problem.scale.size(), 0.0);
    problem.each([&](int64_t at, int64_t from, int64_t to, int64_t col) {
      const bool scaled = item.scale != nullptr;
      const auto times = [&](T value) { return scaled ? narrow<T>(widen(value) * widen(problem.scale[col])) : value; };
      wanted[at] = times(problem.dense[from]);
      wanted_dense[to] = times(problem.grad[at]);
      if (scaled) wanted_scale[col] += double(widen(problem.grad[at])) * double(widen(problem.dense[from]));
    });

    std::vector<T> cpu_packed(packed[i].size(), poison), cpu_dense(dense_grad[i].size(), poison);
    std::vector<T> cpu_scale(problem.scale.size(), poison);
    const stamp_fast::cpu::Columns columns(item);
    stamp_fast::cpu::pack_weights(item, columns, 0, item.rows, cpu_packed.data());
    std::vector<int64_t> packed_row(static_cast<size_t>(item.dense_rows), -1);
    for (int64_t r = 0; r < item.rows; ++r) packed_row[item.row_index ? item.row_index[r] : r] = r;
    std::vector<accumulator_t<T>> sums(2 * problem.scale.size(), 0);
    const int64_t half = item.dense_rows / 2;
    for (int64_t part = 0; part < 2; ++part) {
      void* sum = item.scale ? sums.data() + part * item.cols : nullptr;
      stamp_fast::cpu::pack_weights_backward(item, columns, part ? half : 0, part ? item.dense_rows : half,
                                             packed_row.data(), problem.grad.data(), cpu_dense.data(), sum);
    }
    if (item.scale) {
      stamp_fast::cpu::pack_weights_sum(item.dtype, 2, item.cols, sums.data(), cpu_scale.data());
    }

    CHECK(equal(packed[i], wanted) && equal(cpu_packed, wanted));
    CHECK(equal(dense_grad[i], wanted_dense) && equal(cpu_dense, wanted_dense));
    const double tolerance = sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 1e-5 : 1e-2;
    for (size_t c = 0; c < wanted_scale.size(); ++c) {
      const double slack = tolerance * (std::sqrt(double(item.rows)) + std::abs(wanted_scale[c]));
      CHECK(std::abs(widen(scale_grad[i][c]) - wanted_scale[c]) <= slack);
      CHECK(std::abs(widen(cpu_scale[c]) - wanted_scale[c]) <= slack);
    }
  }
}

template <typename T>
void check_shapes() {
  Problem<T> contiguous(13, 5, 1, 7, 4, 9, true), last(13, 5, 9, 7, 4, 1, true), strided(14, 5, 1, 6, 3, 9, true, 54);
  Problem<T> all(6, 0, 1, 5, 0, 25, false), rows_only(6, 3, 1, 5, 0, 4, false), cols_only(6, 0, 1, 5, 2, 4, true);
  Problem<T> vector(1, 0, 1, 29, 8, 1, true), one(1, 1, 1, 1, 1, 1, true), depthwise(19, 11, 1, 1, 0, 9, true);
  Problem<T> empty(0, 0, 1, 4, 0, 9, false), large(300, 151, 1, 40, 23, 9, true), wide(3, 2, 1, 5000, 4100, 1, true);
  check<T>(
      {&contiguous, &last, &strided, &all, &rows_only, &cols_only, &vector, &one, &depthwise, &empty, &large, &wide});
  // More items than one launch takes.
  check<T>(std::vector<Problem<T>*>(101, &contiguous));
  check<T>({});
}

}  // namespace

int main() {
  for (const bool sorted : {false, true}) {
    ascending = sorted;
    check_shapes<float>();
    check_shapes<double>();
    check_shapes<stamp_fast::BFloat16>();
    check_shapes<stamp_fast::Float16>();
  }
}
