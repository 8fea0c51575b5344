// The finished channel graph: prunable classes in groups, and what any choice of classes costs.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "propagate.h"
#include "record.h"

namespace stamp_fast {

// Classes that occur in exactly the same dims: the output channels of one layer, or of all layers of one residual
// stream. Classes are numbered so that a group's are consecutive.
struct Group {
  int32_t slot = -1;  // the parameter that emits these channels, and along which dim
  int32_t dim = 0;
  int32_t first_class = 0;
  int32_t num_classes = 0;
  int32_t channels = 0;  // positions of that dim that belong to the group
  int32_t event = -1;    // why it cannot be pruned; -1: it can
};

// A dim that shrinks: for each layer, the class of every position (-1: never removed).
struct ClassAxis {
  int64_t size = 0;
  std::vector<std::vector<int32_t>> layers;
};

// cost = constant * product of the live sizes of the axes
struct CostTerm {
  int32_t source = 0;  // operator (MACs) or slot (parameters)
  int64_t constant = 1;
  std::vector<int32_t> axes;
};

struct ClassRead {
  int32_t op = 0;
  int32_t tensor = 0;
  int32_t dim = 0;
  bool exact = true;
  int32_t slot = -1;  // the parameter read, where the operand is a plain view of one
  int32_t slot_dim = -1;
  int32_t axis = -1;
};

struct ScalarArg {
  int32_t op = 0;
  int32_t arg = 0;
  int32_t axis = 0;
};

class ChannelGraph {
 public:
  explicit ChannelGraph(Record record);

  int32_t num_classes() const { return num_classes_; }
  const std::vector<Group>& groups() const { return groups_; }
  const std::vector<Group>& frozen() const { return frozen_; }
  const std::vector<FreezeEvent>& events() const { return propagator_->events(); }
  const std::vector<ClassAxis>& axes() const { return axes_; }
  const std::vector<CostTerm>& macs_terms() const { return macs_; }
  const std::vector<CostTerm>& params_terms() const { return params_; }
  const std::vector<ClassRead>& reads() const { return reads_; }
  const std::map<int32_t, int>& survivors() const { return propagator_->survivors(); }
  const std::map<int32_t, std::vector<int>>& candidates() const { return propagator_->candidates(); }
  const std::vector<ScalarArg>& scalar_args() const { return scalar_args_; }
  const Record& record() const { return record_; }
  // Index into axes() of a tensor's dim, -1 where the dim never shrinks.
  int32_t axis_of(int32_t tensor, int dim) const { return tensor_axes_.at(tensor).at(dim); }

  std::vector<std::vector<int32_t>> slot_axes() const {
    return {tensor_axes_.begin(), tensor_axes_.begin() + record_.num_slots};
  }

  // keep: one byte per class. Live positions of an axis.
  int64_t live(int32_t axis, const uint8_t* keep) const;
  // Live positions among the first `end` of an axis.
  int64_t live_before(int32_t axis, int64_t end, const uint8_t* keep) const;
  int64_t cost(const std::vector<CostTerm>& terms, const uint8_t* keep) const;
  // The shape of every tensor once the other classes are gone.
  std::vector<std::vector<int64_t>> shapes(const uint8_t* keep) const;
  // Groups that label a tensor, or one dim of it.
  std::vector<int32_t> groups_of(int32_t tensor, int dim = -1) const;
  // The event that froze the first frozen position along a slot's dim; -1 where none is.
  int32_t freeze_event(int32_t slot, int dim) const;
  bool is_slot_view(int32_t tensor) const { return propagator_->is_slot_view(tensor); }

 private:
  void number_classes();
  void intern_axes();
  void collect_macs(int32_t i);
  void collect_costs();
  std::vector<bool> grows_with_batch() const;
  void add_product(int32_t op, int64_t constant, const std::vector<std::pair<int32_t, int>>& dims);
  int32_t intern(const Axis& axis);

  Record record_;
  std::unique_ptr<Propagator> propagator_;
  int32_t num_classes_ = 0;
  std::vector<Group> groups_;
  std::vector<Group> frozen_;
  std::vector<int32_t> class_of_root_;
  std::vector<int32_t> group_of_class_;
  std::vector<ClassAxis> axes_;
  std::map<std::vector<const void*>, int32_t> interned_;
  std::map<std::vector<std::vector<int32_t>>, int32_t> by_content_;
  std::vector<std::vector<int32_t>> tensor_axes_;
  std::vector<CostTerm> macs_;
  std::vector<CostTerm> params_;
  std::vector<ClassRead> reads_;
  std::vector<ScalarArg> scalar_args_;
};

}  // namespace stamp_fast
