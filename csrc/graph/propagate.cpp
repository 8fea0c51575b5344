#include "propagate.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_set>

#include "rules.h"

namespace stamp_fast {
namespace {

constexpr int kMaxPasses = 64;

bool all_frozen(const UnionFind& classes, const std::vector<int32_t>& ids) {
  return std::all_of(ids.begin(), ids.end(), [&](int32_t id) { return classes.frozen(id); });
}

void count_uses(const Value& value, std::vector<int32_t>& counts) {
  if (value.is_tensor()) ++counts[value.integer];
  for (const Value& item : value.list) count_uses(item, counts);
}

std::vector<int64_t> strides_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int k = static_cast<int>(sizes.size()) - 2; k >= 0; --k) strides[k] = strides[k + 1] * sizes[k + 1];
  return strides;
}

// Detectors find no box in a trace: how the other dims are folded still shows if there were two. False if it does not.
bool without_zeros(std::vector<int64_t>& from, std::vector<int64_t>& to) {
  int64_t elements = 1;
  for (int64_t& size : from) elements *= size = size == 0 ? 2 : size;
  int64_t* unknown = nullptr;
  for (int64_t& size : to) {
    if (size == 0 && unknown != nullptr) return false;
    if (size == 0)
      unknown = &size;
    else if (elements % size == 0)
      elements /= size;
    else
      return false;
  }
  if (unknown == nullptr) return false;
  *unknown = elements;
  return true;
}

// Divides an axis into pieces of equal size, which the sizes of a record that no network made need not allow.
void check_piece(const Axis& axis, int64_t size) {
  for (const Ids& layer : axis.layers)
    if (size < 1 || static_cast<int64_t>(layer->size()) % size != 0)
      throw std::logic_error("channel graph: " + std::to_string(layer->size()) +
                             " positions cannot be divided into pieces of " + std::to_string(size));
}

}  // namespace

Propagator::Propagator(const Record& record) : record_(record) {
  const size_t n = record.tensors.size();
  labels_.resize(n);
  origins_.resize(n);
  use_count_.resize(n, 0);
  events_.push_back({"meets positions that are constant (padding, or a piece that cannot be cut)", -1});
  for (const Op& op : record.ops)
    for (const Value& arg : op.args) count_uses(arg, use_count_);
  for (const int32_t t : record.outputs) ++use_count_[t];

  for (const auto& [op, axis] : record.survivors) survivor_[op] = axis;
  slot_labels_.resize(record.num_slots);
  for (int32_t slot = 0; slot < record.num_slots; ++slot) {
    Origin origin{slot, {}};
    for (const int64_t size : shape(slot)) {
      origin.dims.push_back(static_cast<int>(origin.dims.size()));
      Axis axis;
      if (size > 1) {
        std::vector<int32_t> ids(size);
        const int32_t first = classes_.fresh(size);
        for (int64_t i = 0; i < size; ++i) ids[i] = first + static_cast<int32_t>(i);
        axis.layers.push_back(make_ids(std::move(ids)));
      }
      slot_labels_[slot].push_back(std::move(axis));
    }
    origins_[slot] = std::move(origin);
  }
}

void Propagator::run() {
  survey_split_sites();
  for (const int32_t slot : record_.pinned)
    for (const Axis& axis : slot_labels_[slot]) freeze(axis, "shares memory with another tensor");
  for (int32_t slot = 0; slot < record_.num_slots; ++slot)
    if (use_count_[slot] == 0)
      for (const Axis& axis : slot_labels_[slot]) freeze(axis, "unused in this forward");
  for (int count = 0; count < kMaxPasses; ++count) {
    changed_ = false;
    pass();
    if (changed_) continue;
    if (strict_) return;
    strict_ = true;
  }
  throw std::runtime_error("channel graph: no fixpoint after 64 passes");
}

void Propagator::pass() {
  reads_.clear();
  derived_.clear();
  producers_.clear();
  for (size_t t = 0; t < labels_.size(); ++t) labels_[t] = Labels(record_.tensors[t].shape.size());
  std::copy(slot_labels_.begin(), slot_labels_.end(), labels_.begin());
  for (size_t i = 0; i < record_.ops.size(); ++i) {
    current_ = static_cast<int32_t>(i);
    apply_rule(*this, record_.ops[i]);
  }
  current_ = -1;
  for (const int32_t t : record_.outputs) freeze_all(t, "output of the model");
  for (const Tie& tie : record_.ties) {
    const Axis a = axis(tie.first, tie.first_dim);
    const Axis b = axis(tie.second, tie.second_dim);
    if (a.rigid() != b.rigid())
      freeze(a.rigid() ? b : a, "has to be as wide as a dimension whose size cannot change");
    else
      join(a, b);
  }
}

// Attention contracts two activations over the head width, and takes q, k and v apart by position. Where a reshape
// made those axes, the heads must survive, and this has to be known before anything is tied: unions cannot be taken
// back.
void Propagator::survey_split_sites() {
  const bool has_attention = std::any_of(record_.ops.begin(), record_.ops.end(),
                                         [](const Op& op) { return op.name.find("bmm") != std::string::npos; });
  if (!has_attention) return;
  const UnionFind classes = classes_;
  const size_t events = events_.size();
  surveying_ = true;
  for (int count = 0; count < 2; ++count) pass();
  surveying_ = false;
  // Only the verdict on the sites is kept.
  classes_ = classes;
  events_.resize(events);
  fresh_.clear();
}

Axis Propagator::axis(int32_t tensor, int dim) const {
  const Axis& stored = labels_.at(tensor).at(dim);
  if (stored.layers.empty()) return stored;
  Axis live;
  live.site = stored.site;
  live.site_axis = stored.site_axis;
  for (const Ids& layer : stored.layers)
    if (!all_frozen(classes_, *layer)) live.layers.push_back(layer);
  return live;
}

void Propagator::set(int32_t tensor, Labels labels) {
  if (labels.size() != shape(tensor).size())
    throw std::logic_error("channel graph: " + record_.ops[current_].name +
                           " gives another number of dims than traced");
  for (int d = 0; d < rank(tensor); ++d)
    for (const Ids& layer : labels[d].layers)
      if (static_cast<int64_t>(layer->size()) != shape(tensor)[d])
        throw std::logic_error("channel graph: " + record_.ops[current_].name + " gives another size than traced");
  labels_[tensor] = std::move(labels);
}

void Propagator::set_origin(int32_t tensor, Origin origin) {
  if (origin.dims.size() == shape(tensor).size()) origins_[tensor] = std::move(origin);
}

Labels Propagator::labels_of(int32_t tensor) const {
  Labels labels;
  for (int d = 0; d < rank(tensor); ++d) labels.push_back(axis(tensor, d));
  return labels;
}

void Propagator::freeze(const Axis& axis, const std::string& reason) {
  int32_t event = -1;
  for (const Ids& layer : axis.layers)
    for (const int32_t id : *layer) {
      if (classes_.frozen(id)) continue;
      if (event < 0) {
        event = static_cast<int32_t>(events_.size());
        events_.push_back({reason, current_});
      }
      changed_ |= classes_.freeze(id, event);
    }
}

bool Propagator::partly_frozen(const Axis& axis) const {
  for (const Ids& layer : axis.layers)
    for (const int32_t id : *layer)
      if (classes_.frozen(id)) return true;
  return false;
}

void Propagator::freeze_all(int32_t tensor, const std::string& reason) {
  for (const Axis& axis : labels_.at(tensor)) freeze(axis, reason);
}

Axis Propagator::join(const Axis& a, const Axis& b) {
  if (a.unknown() && a.layers.empty()) return b;
  if (b.unknown() && b.layers.empty()) return a;
  if (a.rigid() && b.rigid()) return a;
  if (a.rigid() || b.rigid()) {
    freeze(a.rigid() ? b : a, "combined elementwise with a tensor whose size cannot change");
    return {};
  }
  if (a.layers.size() != b.layers.size()) {
    // Kernel dims turn out frozen in the first pass and drop out; only what is still unmatched afterwards is frozen.
    const Axis& fewer = a.layers.size() < b.layers.size() ? a : b;
    if (!strict_ || freeze_copies(&fewer == &a ? b : a)) return fewer;
    freeze(a, "two differently folded sets of channels meet in one dimension");
    freeze(b, "two differently folded sets of channels meet in one dimension");
    return {};
  }
  for (size_t k = 0; k < a.layers.size(); ++k) {
    if (a.layers[k] == b.layers[k]) continue;
    const auto& left = *a.layers[k];
    const auto& right = *b.layers[k];
    if (left.size() != right.size()) throw std::logic_error("channel graph: dims of different sizes meet");
    for (size_t i = 0; i < left.size(); ++i) changed_ |= classes_.unite(left[i], right[i]);
  }
  return a;
}

// Heads of keys that several heads of queries share are folded with their copies: the number of copies stays.
bool Propagator::freeze_copies(const Axis& axis) {
  bool any = false;
  for (const Ids& layer : axis.layers) {
    if (!std::all_of(layer->begin(), layer->end(), [&](int32_t id) { return copies_.contains(id); })) continue;
    Axis copies;
    copies.layers.push_back(layer);
    freeze(copies, "number of copies of the same channels");
    any = true;
  }
  return any;
}

Axis Propagator::fresh_copies(int dim, int64_t size) {
  const Axis axis = fresh(0, dim, size);
  for (const Ids& layer : axis.layers) copies_.insert(layer->begin(), layer->end());
  return axis;
}

void Propagator::contract(const Axis& a, const Axis& b) {
  if ((a.unknown() && a.layers.empty()) || (b.unknown() && b.layers.empty())) return;
  if (a.rigid() && b.rigid()) return;
  if (a.rigid() || b.rigid()) {
    freeze(a.rigid() ? b : a, "multiplied with a tensor whose size cannot change");
    return;
  }
  join(a, b);
}

Axis Propagator::tie_pieces(const Axis& axis, int64_t stride) {
  check_piece(axis, stride);
  Axis piece;
  for (const Ids& layer : axis.layers) {
    std::vector<int32_t> first(layer->begin(), layer->begin() + stride);
    for (size_t i = stride; i < layer->size(); ++i) changed_ |= classes_.unite((*layer)[i], first[i % stride]);
    piece.layers.push_back(make_ids(std::move(first)));
  }
  return piece;
}

Axis Propagator::tie_runs(const Axis& axis, int64_t length) {
  check_piece(axis, length);
  Axis runs;
  for (const Ids& layer : axis.layers) {
    std::vector<int32_t> first;
    for (size_t i = 0; i < layer->size(); ++i) {
      if (i % length == 0) first.push_back((*layer)[i]);
      changed_ |= classes_.unite((*layer)[i], first.back());
    }
    runs.layers.push_back(make_ids(std::move(first)));
  }
  return runs;
}

Axis Propagator::fresh(int output, int dim, int64_t size) {
  if (size <= 1) return {};
  if (size + classes_.size() > kMaxPositions) throw std::length_error("more than 2^28 positions");
  Ids& ids = fresh_[{current_, output, dim}];
  if (!ids) {
    const int32_t first = classes_.fresh(size);
    std::vector<int32_t> made(size);
    for (int64_t i = 0; i < size; ++i) made[i] = first + static_cast<int32_t>(i);
    ids = make_ids(std::move(made));
  }
  Axis axis;
  axis.layers.push_back(ids);
  return axis;
}

Labels Propagator::reshape(int32_t tensor, const std::vector<int64_t>& target) {
  std::vector<int64_t> from = shape(tensor);
  std::vector<int64_t> to = target;
  if (from != to && std::find(from.begin(), from.end(), 0) != from.end() && !without_zeros(from, to)) {
    for (int d = 0; d < rank(tensor); ++d) freeze(axis(tensor, d), "reshaped without an element");
    return Labels(to.size());
  }
  Labels result(to.size());
  for (const ReshapeBlock& block : reshape_blocks(from, to)) {
    if (block.from.size() == 1 && block.to.size() == 1) {
      result[block.to[0]] = axis(tensor, block.from[0]);
      continue;
    }
    std::vector<int64_t> grid;  // sizes of the old dims
    for (const int d : block.from) grid.push_back(from[d]);
    std::vector<int64_t> sizes;
    for (const int d : block.to) sizes.push_back(to[d]);
    const std::vector<int64_t> strides = strides_of(grid);
    const int64_t total = strides[0] * grid[0];
    if (total > kMaxPositions) throw std::length_error("a reshape of more than 2^28 positions");
    std::vector<Axis> pieces(block.to.size());
    for (size_t k = 0; k < block.from.size(); ++k) {
      const Axis source = axis(tensor, block.from[k]);
      if (source.unknown())
        for (Axis& piece : pieces) piece.site = source.site, piece.site_axis = -1;
      for (const Ids& layer : source.layers) {
        std::vector<int32_t> ids(total);
        for (int64_t p = 0; p < total; ++p) ids[p] = (*layer)[(p / strides[k]) % grid[k]];
        reduce(ids, sizes, pieces);
      }
    }
    for (size_t j = 0; j < pieces.size(); ++j) {
      if (target[block.to[j]] == 0)
        freeze(pieces[j], "folded into a dimension without an element");
      else
        result[block.to[j]] = std::move(pieces[j]);
    }
  }
  return result;
}

// One layer of ids over a grid of dims, brought down to a layer on a single dim; it is added to `into`.
void Propagator::reduce(const std::vector<int32_t>& ids, const std::vector<int64_t>& sizes, std::vector<Axis>& into) {
  const auto total = static_cast<int64_t>(ids.size());
  std::vector<int32_t> roots(total);
  for (int64_t p = 0; p < total; ++p) roots[p] = classes_.live_root(ids[p]);
  const std::vector<int64_t> strides = strides_of(sizes);
  std::vector<int> varying;
  for (size_t j = 0; j < sizes.size(); ++j) {
    bool constant = true;
    for (int64_t p = 0; p < total && constant; ++p)
      constant = (p / strides[j]) % sizes[j] == 0 || roots[p] == roots[p - strides[j]];
    if (!constant) varying.push_back(static_cast<int>(j));
  }
  Axis axis;
  if (varying.empty()) {
    axis.layers.push_back(make_ids({ids[0]}));
    freeze(axis, "all channels of the dimension depend on each other");
    return;
  }
  int survivor = varying[0];
  if (varying.size() > 1) {
    std::vector<int> possible;
    for (const int j : varying)
      if (!avoided_[current_].contains(j)) possible.push_back(j);
    // Attention may take q, k and v apart before it splits them into heads: that split shows once this one is settled.
    if (surveying_ && possible.size() != 1) {
      for (const int j : varying) {
        into[j].site = current_;
        into[j].site_axis = j;
      }
      return;
    }
    const auto known = survivor_.find(current_);
    const bool is_known = known != survivor_.end() && known->second >= 0 &&
                          known->second < static_cast<int>(sizes.size());  // a record may say anything
    survivor = surveying_ ? possible[0] : is_known ? known->second : choose_survivor(roots, sizes, varying);
    if (!surveying_) {
      survivor_[current_] = survivor;
      candidates_[current_] = varying;
    }
  }
  std::vector<int32_t> kept(sizes[survivor], -1);
  for (int64_t p = 0; p < total; ++p) {
    int32_t& first = kept[(p / strides[survivor]) % sizes[survivor]];
    if (first < 0)
      first = ids[p];
    else
      changed_ |= classes_.unite(first, ids[p]);
  }
  into[survivor].layers.push_back(make_ids(std::move(kept)));
}

int Propagator::choose_survivor(const std::vector<int32_t>& roots, const std::vector<int64_t>& sizes,
                                const std::vector<int>& candidates) {
  const std::vector<int64_t> strides = strides_of(sizes);
  const auto avoided = avoided_.find(current_);
  int best = -1;
  size_t most = 0;
  for (const int j : candidates) {
    if (avoided != avoided_.end() && avoided->second.contains(j)) continue;
    std::vector<uint64_t> slices(sizes[j], 1469598103934665603ULL);
    for (size_t p = 0; p < roots.size(); ++p) {
      uint64_t& hash = slices[(p / strides[j]) % sizes[j]];
      hash = (hash ^ static_cast<uint64_t>(roots[p])) * 1099511628211ULL;
    }
    const size_t distinct = std::unordered_set<uint64_t>(slices.begin(), slices.end()).size();
    if (distinct > most) {
      most = distinct;
      best = j;
    }
  }
  return best < 0 ? candidates.front() : best;
}

void Propagator::mark_contracted(const Axis& a, const Axis& b) {
  if (!surveying_ || a.site_axis < 0 || b.site_axis < 0) return;
  avoided_[a.site].insert(a.site_axis);
  avoided_[b.site].insert(b.site_axis);
}

void Propagator::mark_taken_apart(const Axis& axis) {
  if (surveying_ && axis.site_axis >= 0) avoided_[axis.site].insert(axis.site_axis);
}

void Propagator::read(int32_t tensor, int dim, bool exact) {
  if (!axis(tensor, dim).layers.empty()) reads_.push_back({current_, tensor, dim, exact});
}

void Propagator::produce(int32_t tensor, int dim) {
  const Origin& origin = origins_.at(tensor);
  if (origin.slot >= 0 && origin.dims.at(dim) >= 0) producers_.emplace_back(origin.slot, origin.dims[dim]);
}

}  // namespace stamp_fast
