#include "labels.h"

namespace stamp_fast {

std::vector<ReshapeBlock> reshape_blocks(const std::vector<int64_t>& from, const std::vector<int64_t>& to) {
  for (const int64_t size : from)
    if (size == 0) return {};
  std::vector<ReshapeBlock> blocks;
  size_t i = 0;
  size_t j = 0;
  const auto skip_ones = [](const std::vector<int64_t>& shape, size_t& k) {
    while (k < shape.size() && shape[k] == 1) ++k;
  };
  for (;;) {
    skip_ones(from, i);
    skip_ones(to, j);
    if (i >= from.size() || j >= to.size()) return blocks;
    ReshapeBlock block{{static_cast<int>(i)}, {static_cast<int>(j)}};
    int64_t left = from[i++];
    int64_t right = to[j++];
    while (left != right) {
      if (left < right) {
        if (from.at(i) != 1) block.from.push_back(static_cast<int>(i));
        left *= from.at(i++);
      } else {
        if (to.at(j) != 1) block.to.push_back(static_cast<int>(j));
        right *= to.at(j++);
      }
    }
    blocks.push_back(std::move(block));
  }
}

}  // namespace stamp_fast
