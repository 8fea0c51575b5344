// Channel ids that live or die together. A class may be frozen: it can then never be removed, and knows why.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace stamp_fast {

class UnionFind {
 public:
  static constexpr int32_t kFree = -1;

  // Id 0 stands for every constant position and is frozen from the start.
  UnionFind() : parent_{0}, reason_{0} {}

  // Returns the first of n new, consecutive ids.
  int32_t fresh(int64_t n) {
    const auto first = static_cast<int32_t>(parent_.size());
    for (int64_t i = 0; i < n; ++i) parent_.push_back(first + static_cast<int32_t>(i));
    reason_.resize(parent_.size(), kFree);
    return first;
  }

  int32_t find(int32_t id) const {
    while (parent_[id] != id) {
      parent_[id] = parent_[parent_[id]];
      id = parent_[id];
    }
    return id;
  }

  // The root, or 0 for every frozen class: what matters where "can it move" is all that is asked.
  int32_t live_root(int32_t id) const {
    const int32_t root = find(id);
    return reason_[root] == kFree ? root : 0;
  }

  bool frozen(int32_t id) const { return reason_[find(id)] != kFree; }
  // Index of the event that froze the class, or kFree.
  int32_t reason(int32_t id) const { return reason_[find(id)]; }

  // Frozen classes stay apart from each other, so that each keeps the reason it was frozen for.
  bool unite(int32_t a, int32_t b) {
    a = find(a);
    b = find(b);
    if (a == b) return false;
    if (reason_[a] != kFree && reason_[b] != kFree) return false;
    if (a > b) std::swap(a, b);
    if (a == 0) return freeze(b, reason_[0]);
    parent_[b] = a;
    if (reason_[a] == kFree) reason_[a] = reason_[b];
    return true;
  }

  bool freeze(int32_t id, int32_t event) {
    const int32_t root = find(id);
    if (reason_[root] != kFree) return false;
    reason_[root] = event;
    return true;
  }

  int32_t size() const { return static_cast<int32_t>(parent_.size()); }

 private:
  mutable std::vector<int32_t> parent_;
  std::vector<int32_t> reason_;
};

}  // namespace stamp_fast
