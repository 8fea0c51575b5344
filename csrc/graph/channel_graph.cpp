#include "channel_graph.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "rules.h"

namespace stamp_fast {
namespace {

uint64_t mix(uint64_t hash, uint64_t value) {
  hash ^= value + 0x9e3779b97f4a7c15ULL + (hash << 6) + (hash >> 2);
  return hash * 0xff51afd7ed558ccdULL;
}

int64_t multiply(int64_t a, int64_t b) {
  int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) throw std::overflow_error("channel graph: a cost is beyond 2^63");
  return result;
}

int64_t product(const std::vector<int64_t>& shape, size_t from, size_t to) {
  int64_t result = 1;
  for (size_t d = from; d < to && d < shape.size(); ++d) result = multiply(result, shape[d]);
  return result;
}

}  // namespace

ChannelGraph::ChannelGraph(Record record) : record_(std::move(record)) {
  validate(record_);
  propagator_ = std::make_unique<Propagator>(record_);
  propagator_->run();
  number_classes();
  intern_axes();
  collect_costs();
}

void ChannelGraph::number_classes() {
  const UnionFind& classes = propagator_->classes();
  // Classes with the same signature occur in the same dims, each dim counted once.
  std::vector<uint64_t> signature(classes.size(), 0);
  std::vector<uint64_t> last_token(classes.size(), 0);
  std::map<const void*, bool> seen;
  uint64_t token = 0;
  for (const Labels& labels : propagator_->labels())
    for (const Axis& axis : labels)
      for (const Ids& layer : axis.layers) {
        if (!seen.emplace(layer.get(), true).second) continue;
        ++token;
        for (const int32_t id : *layer) {
          const int32_t root = classes.live_root(id);
          if (root == 0 || last_token[root] == token) continue;
          last_token[root] = token;
          signature[root] = mix(signature[root], token);
        }
      }

  class_of_root_.assign(classes.size(), -1);
  std::vector<int32_t> group_of_root(classes.size(), -1);
  std::unordered_map<uint64_t, int32_t> group_of_signature;
  std::vector<std::vector<int32_t>> members;
  const auto visit = [&](int32_t slot, int32_t dim, bool is_producer) {
    std::map<int32_t, int32_t> frozen_by;  // event -> index into frozen_
    std::map<int32_t, int32_t> made_here;
    for (const Ids& layer : propagator_->labels()[slot][dim].layers)
      for (const int32_t id : *layer) {
        const int32_t root = classes.live_root(id);
        if (root == 0) {
          if (!is_producer) continue;
          const int32_t event = classes.reason(id);
          const auto [entry, is_new] = frozen_by.emplace(event, static_cast<int32_t>(frozen_.size()));
          if (is_new) frozen_.push_back({slot, dim, 0, 0, 0, event});
          ++frozen_[entry->second].channels;
          continue;
        }
        int32_t group = group_of_root[root];
        if (group < 0) {
          const auto [entry, is_new] =
              group_of_signature.emplace(signature[root], static_cast<int32_t>(groups_.size()));
          group = entry->second;
          if (is_new) {
            groups_.push_back({slot, dim, 0, 0, 0, -1});
            members.emplace_back();
          }
          group_of_root[root] = group;
          members[group].push_back(root);
        }
        if (groups_[group].slot == slot && groups_[group].dim == dim) ++groups_[group].channels;
      }
  };
  std::map<std::pair<int32_t, int32_t>, bool> visited;
  for (const auto& [slot, dim] : propagator_->producers())
    if (visited.emplace(std::make_pair(slot, dim), true).second) visit(slot, dim, true);
  for (int32_t slot = 0; slot < record_.num_slots; ++slot)
    for (int32_t dim = 0; dim < propagator_->rank(slot); ++dim)
      if (visited.emplace(std::make_pair(slot, dim), true).second) visit(slot, dim, false);

  for (size_t g = 0; g < groups_.size(); ++g) {
    groups_[g].first_class = num_classes_;
    groups_[g].num_classes = static_cast<int32_t>(members[g].size());
    for (const int32_t root : members[g]) {
      class_of_root_[root] = num_classes_++;
      group_of_class_.push_back(static_cast<int32_t>(g));
    }
  }
}

int32_t ChannelGraph::intern(const Axis& axis) {
  const UnionFind& classes = propagator_->classes();
  std::vector<const void*> key;
  for (const Ids& layer : axis.layers) key.push_back(layer.get());
  const auto known = interned_.find(key);
  if (known != interned_.end()) return known->second;
  ClassAxis made;
  for (const Ids& layer : axis.layers) {
    std::vector<int32_t> positions(layer->size(), -1);
    bool shrinks = false;
    for (size_t i = 0; i < layer->size(); ++i) {
      const int32_t root = classes.live_root((*layer)[i]);
      positions[i] = root == 0 ? -1 : class_of_root_[root];
      shrinks |= positions[i] >= 0;
    }
    made.size = static_cast<int64_t>(layer->size());
    if (shrinks) made.layers.push_back(std::move(positions));
  }
  int32_t index = -1;
  if (!made.layers.empty()) {
    // A weight and its norm's four vectors have ids of their own, and the same classes.
    const auto [entry, is_new] = by_content_.emplace(made.layers, static_cast<int32_t>(axes_.size()));
    index = entry->second;
    if (is_new) axes_.push_back(std::move(made));
  }
  interned_.emplace(std::move(key), index);
  return index;
}

void ChannelGraph::intern_axes() {
  for (const Labels& labels : propagator_->labels()) {
    std::vector<int32_t> dims;
    for (const Axis& axis : labels) dims.push_back(axis.layers.empty() ? -1 : intern(axis));
    tensor_axes_.push_back(std::move(dims));
  }
  for (const Read& read : propagator_->reads()) {
    const int32_t axis = axis_of(read.tensor, read.dim);
    if (axis < 0) continue;
    ClassRead made{read.op, read.tensor, read.dim, read.exact, -1, -1, axis};
    const Origin& origin = propagator_->origin(read.tensor);
    if (origin.slot >= 0) {
      made.slot = origin.slot;
      made.slot_dim = origin.dims.at(read.dim);
    }
    reads_.push_back(made);
  }
  for (const DerivedArg& derived : propagator_->derived()) {
    const int32_t axis = intern(derived.axis);
    if (axis >= 0) scalar_args_.push_back({derived.op, derived.arg, axis});
  }
}

void ChannelGraph::add_product(int32_t op, int64_t constant, const std::vector<std::pair<int32_t, int>>& dims) {
  CostTerm term{op, constant, {}};
  for (const auto& [tensor, dim] : dims) {
    const int32_t axis = axis_of(tensor, dim);
    if (axis < 0)
      term.constant = multiply(term.constant, propagator_->shape(tensor)[dim]);
    else
      term.axes.push_back(axis);
  }
  macs_.push_back(std::move(term));
}

void ChannelGraph::collect_macs(int32_t i) {
  const Op& op = record_.ops[i];
  const std::string name = base_name(op.name);
  if (name == "convolution") {
    const int32_t x = tensor_arg(op, 0);
    const int32_t weight = tensor_arg(op, 1);
    const Checked<int64_t>& kernel = propagator_->shape(weight);
    const int channel = propagator_->rank(x) - (static_cast<int>(kernel.size()) - 1);
    const Checked<int64_t>& grid = propagator_->shape(int_arg(op, 6) != 0 ? x : op.outs[0]);
    int64_t constant = multiply(product(kernel, 2, kernel.size()), product(grid, channel + 1, grid.size()));
    if (channel == 1) constant = multiply(constant, grid[0]);
    add_product(i, constant, {{weight, 0}, {weight, 1}});
  } else if (name == "mm" || name == "bmm" || name == "addmm" || name == "baddbmm") {
    const int32_t a = tensor_arg(op, name == "mm" || name == "bmm" ? 0 : 1);
    const int32_t out = op.outs[0];
    std::vector<std::pair<int32_t, int>> dims;
    for (int d = 0; d < propagator_->rank(out); ++d) dims.emplace_back(out, d);
    dims.emplace_back(a, propagator_->rank(a) - 1);
    add_product(i, 1, dims);
  } else if (name == "linear") {
    const int32_t weight = tensor_arg(op, 1);
    const Checked<int64_t>& x = propagator_->shape(tensor_arg(op, 0));
    add_product(i, product(x, 0, x.size() - 1), {{weight, 0}, {weight, 1}});
  } else if (name.find("scaled_dot_product") != std::string::npos) {
    const int32_t q = tensor_arg(op, 0);
    const int32_t k = tensor_arg(op, 1);
    const int32_t v = tensor_arg(op, 2);
    const int last = propagator_->rank(q) - 1;
    for (const int32_t wide : {q, v}) {
      std::vector<std::pair<int32_t, int>> dims{{k, last - 1}, {wide, last}};
      for (int d = 0; d < last; ++d) dims.emplace_back(q, d);
      add_product(i, 1, dims);
    }
  }
}

// Which operators have more to do for a larger batch: those on anything that comes from an input, and those that make a
// tensor for the whole batch themselves (initial states, a token repeated for each example).
std::vector<bool> ChannelGraph::grows_with_batch() const {
  std::vector<bool> batched(record_.tensors.size(), false);
  for (const int32_t input : record_.batched) batched[input] = true;
  std::vector<bool> result(record_.num_costed_ops, false);
  const auto is_batch_long = [&](int32_t t) {
    return propagator_->rank(t) > 0 && record_.tensors[t].shape[0] == record_.batch;
  };
  for (int32_t i = 0; i < record_.num_costed_ops; ++i) {
    const Op& op = record_.ops[i];
    bool from_tensor = false;
    const auto visit = [&](const auto& self, const Value& value) -> void {
      if (value.is_tensor()) {
        result[i] = result[i] || batched[value.integer];
        from_tensor = true;
      }
      for (const Value& item : value.list) self(self, item);
    };
    for (const Value& arg : op.args) visit(visit, arg);
    const std::string name = base_name(op.name);
    const bool repeats = name == "expand" || name == "repeat" || name.rfind("new_", 0) == 0;
    const bool is_table = name == "arange" || name == "linspace" || name == "eye";  // of positions
    const bool may_repeat = repeats && !(op.args[0].is_tensor() && is_batch_long(tensor_arg(op, 0)));
    for (const int32_t out : op.outs)
      result[i] = result[i] || (!from_tensor && !is_table) || (may_repeat && is_batch_long(out));
    for (const int32_t out : op.outs) batched[out] = batched[out] || result[i];
  }
  return result;
}

void ChannelGraph::collect_costs() {
  const std::vector<bool> grows = grows_with_batch();
  for (int32_t i = 0; i < record_.num_costed_ops; ++i) {
    try {
      collect_macs(i);
    } catch (const std::out_of_range&) {
      // Not the operator that its name says: it costs nothing that could be told.
    }
  }
  // The cost is that of the recorded batch, of which an example is a fraction.
  for (CostTerm& term : macs_)
    if (!grows[term.source]) term.constant = multiply(term.constant, record_.batch);
  for (int32_t slot = 0; slot < record_.num_slots; ++slot) {
    if (!record_.is_parameter[slot]) continue;
    CostTerm term{slot, 1, {}};
    for (int d = 0; d < propagator_->rank(slot); ++d) {
      const int32_t axis = axis_of(slot, d);
      if (axis < 0)
        term.constant = multiply(term.constant, record_.tensors[slot].shape[d]);
      else
        term.axes.push_back(axis);
    }
    params_.push_back(std::move(term));
  }
}

int64_t ChannelGraph::live(int32_t axis, const uint8_t* keep) const {
  return live_before(axis, axes_[axis].size, keep);
}

int64_t ChannelGraph::live_before(int32_t axis, int64_t end, const uint8_t* keep) const {
  const ClassAxis& dim = axes_.at(axis);
  end = std::min(end, dim.size);
  int64_t count = 0;
  if (dim.layers.size() == 1) {
    for (int64_t i = 0; i < end; ++i) count += dim.layers[0][i] < 0 || keep[dim.layers[0][i]] != 0;
    return count;
  }
  for (int64_t i = 0; i < end; ++i) {
    bool alive = true;
    for (const auto& layer : dim.layers) alive &= layer[i] < 0 || keep[layer[i]] != 0;
    count += alive;
  }
  return count;
}

int64_t ChannelGraph::cost(const std::vector<CostTerm>& terms, const uint8_t* keep) const {
  std::vector<int64_t> counts(axes_.size(), -1);
  int64_t total = 0;
  for (const CostTerm& term : terms) {
    int64_t value = term.constant;
    for (const int32_t axis : term.axes) {
      if (counts[axis] < 0) counts[axis] = live(axis, keep);
      value = multiply(value, counts[axis]);
    }
    if (__builtin_add_overflow(total, value, &total)) throw std::overflow_error("channel graph: a cost is beyond 2^63");
  }
  return total;
}

std::vector<std::vector<int64_t>> ChannelGraph::shapes(const uint8_t* keep) const {
  std::vector<int64_t> counts(axes_.size());
  for (size_t a = 0; a < axes_.size(); ++a) counts[a] = live(static_cast<int32_t>(a), keep);
  std::vector<std::vector<int64_t>> result;
  result.reserve(record_.tensors.size());
  for (size_t t = 0; t < record_.tensors.size(); ++t) {
    std::vector<int64_t> shape = record_.tensors[t].shape;
    for (size_t d = 0; d < shape.size(); ++d)
      if (tensor_axes_[t][d] >= 0) shape[d] = counts[tensor_axes_[t][d]];
    result.push_back(std::move(shape));
  }
  return result;
}

std::vector<int32_t> ChannelGraph::groups_of(int32_t tensor, int dim) const {
  std::set<int32_t> found;
  for (int d = 0; d < static_cast<int>(tensor_axes_.at(tensor).size()); ++d) {
    const int32_t axis = tensor_axes_[tensor][d];
    if (axis < 0 || (dim >= 0 && d != dim)) continue;
    for (const auto& layer : axes_[axis].layers)
      for (const int32_t c : layer)
        if (c >= 0) found.insert(group_of_class_[c]);
  }
  return {found.begin(), found.end()};
}

int32_t ChannelGraph::freeze_event(int32_t slot, int dim) const {
  for (const Ids& layer : propagator_->labels().at(slot).at(dim).layers)
    for (const int32_t id : *layer)
      if (propagator_->classes().frozen(id)) return propagator_->classes().reason(id);
  return -1;
}

}  // namespace stamp_fast
