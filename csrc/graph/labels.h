// Labels: for each dimension of a tensor, which channel class every position belongs to.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "record.h"

namespace stamp_fast {

using Ids = std::shared_ptr<const std::vector<int32_t>>;

inline Ids make_ids(std::vector<int32_t> ids) { return std::make_shared<const std::vector<int32_t>>(std::move(ids)); }

// One dimension. A position dies as soon as its id in ANY layer dies. No layer means rigid: no position can be removed.
struct Axis {
  std::vector<Ids> layers;
  // While split sites are being looked at (first pass), the site that made this axis; the axis is then unknown, not
  // rigid.
  int32_t site = -1;
  int32_t site_axis = -1;

  bool unknown() const { return site >= 0; }
  bool rigid() const { return layers.empty() && !unknown(); }
};

using Labels = Checked<Axis>;

// A run of old dims and the run of new dims that holds the same elements in the same order.
struct ReshapeBlock {
  std::vector<int> from;
  std::vector<int> to;
};

// Splits a reshape into its smallest independent blocks. Dims of size 1 belong to no block. Empty if a size is 0.
std::vector<ReshapeBlock> reshape_blocks(const std::vector<int64_t>& from, const std::vector<int64_t>& to);

}  // namespace stamp_fast
