// Runs the rule table over a record until no two channel classes can be told to merge or freeze any more.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <unordered_set>
#include <vector>

#include "labels.h"
#include "record.h"
#include "union_find.h"

namespace stamp_fast {

// Why and where a class was frozen. op = -1: outside any operator.
struct FreezeEvent {
  std::string reason;
  int32_t op = -1;
};

// An operator that contracts or reduces a labelled dim. exact: zeroing the dead positions of this operand there equals
// removing them. Otherwise the operator must be computed on the live positions alone.
struct Read {
  int32_t op = 0;
  int32_t tensor = 0;
  int32_t dim = 0;
  bool exact = true;
};

// A size that an operator takes as a scalar argument and that follows a label (groups of a convolution).
struct DerivedArg {
  int32_t op = 0;
  int32_t arg = 0;
  Axis axis;  // the argument is the number of live positions
};

// The slot (parameter or buffer) a tensor is a plain view of, and which slot dim each of its dims is.
struct Origin {
  int32_t slot = -1;
  std::vector<int> dims;
};

class Propagator {
 public:
  explicit Propagator(const Record& record);
  // Reaches the fixpoint. With it, labels, reads and derived arguments are final.
  void run();

  const Record& record() const { return record_; }
  const UnionFind& classes() const { return classes_; }
  const std::vector<Labels>& labels() const { return labels_; }
  const std::vector<FreezeEvent>& events() const { return events_; }
  const std::vector<Read>& reads() const { return reads_; }
  const std::vector<DerivedArg>& derived() const { return derived_; }
  const std::vector<std::pair<int32_t, int32_t>>& producers() const { return producers_; }
  // Reshapes that split channels into several axes: the axis that survives, and those that could.
  const std::map<int32_t, int>& survivors() const { return survivor_; }
  const std::map<int32_t, std::vector<int>>& candidates() const { return candidates_; }
  const Origin& origin(int32_t tensor) const { return origins_.at(tensor); }

  // --- what the rules work with -------------------------------------------------------------------------------
  const Checked<int64_t>& shape(int32_t tensor) const { return record_.tensors.at(tensor).shape; }
  int rank(int32_t tensor) const { return static_cast<int>(shape(tensor).size()); }
  Axis axis(int32_t tensor, int dim) const;
  Labels labels_of(int32_t tensor) const;
  void set(int32_t tensor, Labels labels);
  void set_origin(int32_t tensor, Origin origin);
  bool is_used(int32_t tensor) const { return use_count_.at(tensor) > 0; }
  bool is_slot_view(int32_t tensor) const { return origins_.at(tensor).slot >= 0; }

  void freeze(const Axis& axis, const std::string& reason);
  bool partly_frozen(const Axis& axis) const;
  void freeze_all(int32_t tensor, const std::string& reason);
  // The two axes are the same positions: an elementwise operator meets them. Returns the joined label.
  Axis join(const Axis& a, const Axis& b);
  // The two axes are summed over together.
  void contract(const Axis& a, const Axis& b);
  // Ties positions p, p + stride, p + 2 * stride, ... of the axis; returns the label of the first `stride`.
  Axis tie_pieces(const Axis& axis, int64_t stride);
  // Ties each run of `length` consecutive positions; returns one position per run.
  Axis tie_runs(const Axis& axis, int64_t length);
  // Ids of this operator's own, the same in every pass.
  Axis fresh(int output, int dim, int64_t size);
  // The same for a dim that holds copies.
  Axis fresh_copies(int dim, int64_t size);
  Labels reshape(int32_t tensor, const std::vector<int64_t>& target);

  void read(int32_t tensor, int dim, bool exact);
  void derive_arg(int32_t arg, const Axis& axis) { derived_.push_back({current_, arg, axis}); }
  // Names the slot dim whose positions this operator emits as channels.
  void produce(int32_t tensor, int dim);
  // A split into heads: the axis that activations contract later must not be the one that survives.
  void mark_contracted(const Axis& a, const Axis& b);
  // Likewise for an axis whose positions are used one by one, or beside one that has to survive.
  void mark_taken_apart(const Axis& axis);

 private:
  void pass();
  bool freeze_copies(const Axis& axis);
  void survey_split_sites();
  void reduce(const std::vector<int32_t>& ids, const std::vector<int64_t>& sizes, std::vector<Axis>& into);
  int choose_survivor(const std::vector<int32_t>& roots, const std::vector<int64_t>& sizes,
                      const std::vector<int>& candidates);

  const Record& record_;
  UnionFind classes_;
  std::vector<Labels> labels_;
  std::vector<Labels> slot_labels_;
  std::vector<Origin> origins_;
  std::vector<int32_t> use_count_;
  std::vector<FreezeEvent> events_;
  std::vector<Read> reads_;
  std::vector<DerivedArg> derived_;
  std::vector<std::pair<int32_t, int32_t>> producers_;
  std::map<std::tuple<int32_t, int, int>, Ids> fresh_;
  std::unordered_set<int32_t> copies_;  // ids of dims that were grown from size 1
  std::map<int32_t, int> survivor_;     // split site -> axis that survives
  std::map<int32_t, std::vector<int>> candidates_;
  std::map<int32_t, std::set<int>> avoided_;  // split site -> axes that must not survive
  int32_t current_ = -1;
  bool surveying_ = false;  // first look at split sites: tie nothing there
  bool strict_ = false;     // last passes: labels that cannot be matched are frozen
  bool changed_ = false;
};

}  // namespace stamp_fast
