// Runs pieces of unequal work on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace stamp_fast::cpu {

// Elements below which a second thread costs more than it brings.
inline constexpr int64_t kGrain = 32768;

class WorkList {
 public:
  void add(int64_t work) {
    starts_.push_back(total_);
    total_ += std::max<int64_t>(work, 1);
  }

  // Calls function(piece) for every piece added; threads get contiguous runs of about equal work.
  template <typename Function>
  void run(const Function& function) const {
    torch::stable::parallel_for(0, total_, kGrain, [&](int64_t begin, int64_t end) {
      auto piece = std::lower_bound(starts_.begin(), starts_.end(), begin);
      for (; piece != starts_.end() && *piece < end; ++piece) function(piece - starts_.begin());
    });
  }

 private:
  std::vector<int64_t> starts_;
  int64_t total_ = 0;
};

}  // namespace stamp_fast::cpu
