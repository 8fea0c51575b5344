// Views, concatenation, slicing, padding and everything that moves positions without computing on them.
#include <algorithm>
#include <cctype>

#include "rules.h"

namespace stamp_fast {
namespace {

Axis sub_axis(const Axis& axis, int64_t start, int64_t length) {
  Axis piece;
  for (const Ids& layer : axis.layers)
    if (start < 0 || length < 0 || start + length > static_cast<int64_t>(layer->size()))
      throw std::out_of_range("a piece lies outside of its dim");
  piece.site = axis.site;
  piece.site_axis = axis.site_axis;
  for (const Ids& layer : axis.layers)
    piece.layers.push_back(make_ids({layer->begin() + start, layer->begin() + start + length}));
  return piece;
}

// Pieces one behind the other. A rigid piece holds constant positions (id 0) in every layer.
Axis concatenate(const std::vector<Axis>& pieces, const std::vector<int64_t>& sizes) {
  size_t layers = 0;
  Axis result;
  int64_t total = 0;
  for (const int64_t size : sizes) {
    if (size < 0 || size > kMaxPositions - total) throw std::length_error("more than 2^28 positions");
    total += size;
  }
  for (const Axis& piece : pieces) {
    layers = std::max(layers, piece.layers.size());
    if (piece.unknown()) result.site = piece.site;
  }
  for (size_t k = 0; k < layers; ++k) {
    std::vector<int32_t> ids;
    for (size_t p = 0; p < pieces.size(); ++p) {
      if (k < pieces[p].layers.size())
        ids.insert(ids.end(), pieces[p].layers[k]->begin(), pieces[p].layers[k]->end());
      else
        ids.insert(ids.end(), sizes[p], 0);
    }
    result.layers.push_back(make_ids(std::move(ids)));
  }
  return result;
}

void rearrange(Propagator& graph, const Op& op, const std::vector<int>& order) {
  const int32_t x = tensor_arg(op, 0);
  Labels labels;
  for (const int d : order) labels.push_back(d < 0 ? Axis{} : graph.axis(x, d));
  graph.set(op.outs[0], std::move(labels));
  const Origin& source = graph.origin(x);
  if (source.slot < 0) return;
  Origin origin{source.slot, {}};
  for (const int d : order) origin.dims.push_back(d < 0 ? -1 : source.dims[d]);
  graph.set_origin(op.outs[0], std::move(origin));
}

std::vector<int> identity_order(int rank) {
  std::vector<int> order(rank);
  for (int d = 0; d < rank; ++d) order[d] = d;
  return order;
}

void view(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  graph.set(op.outs[0], graph.reshape(x, graph.shape(op.outs[0])));
  if (graph.shape(x) == graph.shape(op.outs[0])) graph.set_origin(op.outs[0], graph.origin(x));
}

void permute(Propagator& graph, const Op& op) {
  const int rank = graph.rank(tensor_arg(op, 0));
  std::vector<int> order;
  for (const int64_t d : list_arg(op, 1)) order.push_back(wrap_dim(d, rank));
  rearrange(graph, op, order);
}

void t(Propagator& graph, const Op& op) {
  std::vector<int> order = identity_order(graph.rank(tensor_arg(op, 0)));
  std::reverse(order.begin(), order.end());
  rearrange(graph, op, order);
}

void transpose(Propagator& graph, const Op& op) {
  const int rank = graph.rank(tensor_arg(op, 0));
  std::vector<int> order = identity_order(rank);
  if (rank > 0) std::swap(order[wrap_dim(int_arg(op, 1), rank)], order[wrap_dim(int_arg(op, 2), rank)]);
  rearrange(graph, op, order);
}

void unsqueeze(Propagator& graph, const Op& op) {
  const int rank = graph.rank(tensor_arg(op, 0));
  std::vector<int> order = identity_order(rank);
  order.insert(order.begin() + wrap_dim(int_arg(op, 1), rank + 1), -1);
  rearrange(graph, op, order);
}

// Only dims of size 1 go; which ones is read off the output.
void squeeze(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int rank = graph.rank(x);
  std::vector<int64_t> dims = list_arg(op, 1);
  const bool every = dims.empty() && op.args.size() < 2;
  std::vector<bool> named(rank, every);
  for (const int64_t d : dims)
    if (rank > 0) named[wrap_dim(d, rank)] = true;
  std::vector<int> order;
  for (int d = 0; d < rank; ++d)
    if (!(named[d] && graph.shape(x)[d] == 1)) order.push_back(d);
  rearrange(graph, op, order);
}

// A dim grown from size 1 holds copies: its size follows whatever it meets, hence ids of its own.
void expand(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int32_t out = op.outs[0];
  const int offset = graph.rank(out) - graph.rank(x);
  Labels labels(graph.rank(out));
  for (int d = 0; d < graph.rank(out); ++d) {
    const bool grown = d < offset || graph.shape(x)[d - offset] != graph.shape(out)[d];
    labels[d] = grown ? graph.fresh_copies(d, graph.shape(out)[d]) : graph.axis(x, d - offset);
  }
  graph.set(out, std::move(labels));
}

void repeat(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int32_t out = op.outs[0];
  const int offset = graph.rank(out) - graph.rank(x);
  Labels labels(graph.rank(out));
  for (int d = 0; d < graph.rank(out); ++d) {
    const int64_t size = d < offset ? 1 : graph.shape(x)[d - offset];
    const int64_t times = size == 0 ? 0 : graph.shape(out)[d] / size;
    if (times > kMaxPositions / std::max<int64_t>(size, 1)) throw std::length_error("more than 2^28 positions");
    if (size == 1)
      labels[d] = graph.fresh(0, d, graph.shape(out)[d]);
    else
      labels[d] = concatenate(std::vector<Axis>(times, graph.axis(x, d - offset)), std::vector<int64_t>(times, size));
  }
  graph.set(out, std::move(labels));
}

// slice(x, dim, start, end, step)
void slice(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int dim = wrap_dim(int_arg(op, 1), graph.rank(x));
  const int64_t size = graph.shape(x)[dim];
  int64_t start = int_arg(op, 2);
  if (start < 0) start += size;
  start = std::clamp<int64_t>(start, 0, size);
  Labels labels = graph.labels_of(x);
  const int64_t length = graph.shape(op.outs[0])[dim];
  if (int_arg(op, 4, 1) != 1) {
    graph.freeze(labels[dim], "sliced with a step");
    labels[dim] = {};
  } else if (length != size) {
    labels[dim] = sub_axis(labels[dim], start, length);
  }
  graph.set(op.outs[0], std::move(labels));
  if (length == size) graph.set_origin(op.outs[0], graph.origin(x));
}

void freeze_dim_and_drop(Propagator& graph, const Op& op, int dim, const std::string& reason) {
  const int32_t x = tensor_arg(op, 0);
  graph.mark_taken_apart(graph.axis(x, dim));
  graph.freeze(graph.axis(x, dim), reason);
  Labels labels = graph.labels_of(x);
  labels.erase(labels.begin() + dim);
  for (const int32_t out : op.outs) graph.set(out, labels);
}

void select(Propagator& graph, const Op& op) {
  const int dim = wrap_dim(int_arg(op, 1), graph.rank(tensor_arg(op, 0)));
  freeze_dim_and_drop(graph, op, dim, "one position is selected by its index");
}

void unbind(Propagator& graph, const Op& op) {
  const int dim = wrap_dim(int_arg(op, 1), graph.rank(tensor_arg(op, 0)));
  freeze_dim_and_drop(graph, op, dim, "taken apart position by position");
}

// unfold(x, dim, size, step): windows along dim, their positions in a new last dim.
void unfold(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  if (graph.rank(x) > 0) graph.freeze(graph.axis(x, wrap_dim(int_arg(op, 1), graph.rank(x))), "cut into windows");
  Labels labels = graph.labels_of(x);
  if (!labels.empty()) labels[wrap_dim(int_arg(op, 1), graph.rank(x))] = {};
  labels.resize(graph.rank(op.outs[0]));
  graph.set(op.outs[0], std::move(labels));
}

// split(x, size, dim): one size for all pieces, so all pieces must shrink alike.
void split(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int dim = wrap_dim(int_arg(op, 2), graph.rank(x));
  const int64_t piece = graph.shape(op.outs[0])[dim];
  const int64_t size = graph.shape(x)[dim];
  Labels labels = graph.labels_of(x);
  if (op.outs.size() > 1 && size > 0) {
    if (size % positive(piece) == 0) {
      labels[dim] = graph.tie_pieces(labels[dim], piece);
    } else {
      graph.freeze(labels[dim], "split into pieces of unequal size");
      labels[dim] = {};
    }
  }
  for (const int32_t out : op.outs) graph.set(out, labels);
}

void split_with_sizes(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int dim = wrap_dim(int_arg(op, 2), graph.rank(x));
  int64_t start = 0;
  for (const int32_t out : op.outs) {
    Labels labels = graph.labels_of(x);
    labels[dim] = sub_axis(labels[dim], start, graph.shape(out)[dim]);
    start += graph.shape(out)[dim];
    graph.set(out, std::move(labels));
  }
}

std::vector<int32_t> tensors_of(const Value& value) {
  std::vector<int32_t> tensors;
  for (const Value& item : value.list)
    if (item.is_tensor()) tensors.push_back(static_cast<int32_t>(item.integer));
  return tensors;
}

// cat(tensors, dim)
void cat(Propagator& graph, const Op& op) {
  const int32_t out = op.outs[0];
  const int rank = graph.rank(out);
  const int dim = wrap_dim(int_arg(op, 1), rank);
  Labels labels(rank);
  std::vector<Axis> pieces;
  std::vector<int64_t> sizes;
  bool first = true;
  for (const int32_t x : tensors_of(op.args[0])) {
    if (graph.rank(x) != rank) continue;  // an empty 1-d tensor is allowed anywhere
    for (int d = 0; d < rank; ++d)
      if (d != dim && graph.shape(out)[d] > 1)
        labels[d] = first ? graph.axis(x, d) : graph.join(labels[d], graph.axis(x, d));
    pieces.push_back(graph.axis(x, dim));
    sizes.push_back(graph.shape(x)[dim]);
    first = false;
  }
  labels[dim] = concatenate(pieces, sizes);
  graph.set(out, std::move(labels));
}

void stack(Propagator& graph, const Op& op) {
  const int32_t out = op.outs[0];
  const int dim = wrap_dim(int_arg(op, 1), graph.rank(out));
  Labels labels;
  for (const int32_t x : tensors_of(op.args[0])) {
    if (labels.empty()) {
      labels = graph.labels_of(x);
      continue;
    }
    for (int d = 0; d < graph.rank(x); ++d) labels[d] = graph.join(labels[d], graph.axis(x, d));
  }
  if (static_cast<int>(labels.size()) < dim) throw std::out_of_range("stack of nothing");
  labels.insert(labels.begin() + dim, Axis{});
  graph.set(out, std::move(labels));
}

// constant_pad_nd(x, pad, value): only the added positions are constant.
void pad(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int rank = graph.rank(x);
  const std::vector<int64_t> amounts = list_arg(op, 1);
  Labels labels = graph.labels_of(x);
  for (size_t k = 0; 2 * k + 1 < amounts.size(); ++k) {
    const int dim = rank - 1 - static_cast<int>(k);
    const int64_t before = amounts[2 * k];
    const int64_t after = amounts[2 * k + 1];
    if (before == 0 && after == 0) continue;
    if (before < 0 || after < 0) {
      graph.freeze(labels[dim], "cropped by a negative pad");
      labels[dim] = {};
      continue;
    }
    labels[dim] = concatenate({Axis{}, labels[dim], Axis{}}, {before, graph.shape(x)[dim], after});
  }
  graph.set(op.outs[0], std::move(labels));
}

// roll(x, shifts, dims), flip(x, dims): positions move by literal amounts.
void moved_by_literal(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const bool is_roll = base_name(op.name) == "roll";
  std::vector<int64_t> dims = list_arg(op, is_roll ? 2 : 1);
  if (dims.empty())
    for (int d = 0; d < graph.rank(x); ++d) dims.push_back(d);
  for (const int64_t d : dims)
    graph.freeze(graph.axis(x, wrap_dim(d, graph.rank(x))), "positions are rolled or flipped");
  graph.set(op.outs[0], graph.labels_of(x));
}

void cumulative(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  if (graph.rank(x) > 0)
    graph.freeze(graph.axis(x, wrap_dim(int_arg(op, 1), graph.rank(x))), "accumulated along the dimension");
  graph.set(op.outs[0], graph.labels_of(x));
}

// Pooling, interpolation and padding by reflection: the last 1, 2 or 3 dims are spatial, the rest passes through.
void spatial(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  int spatial_dims = 2;
  for (size_t i = 0; i + 1 < op.name.size(); ++i)
    if (std::isdigit(static_cast<unsigned char>(op.name[i])) && op.name[i + 1] == 'd') spatial_dims = op.name[i] - '0';
  const int kept = graph.rank(x) - spatial_dims;
  for (int d = kept; d < graph.rank(x); ++d) graph.freeze(graph.axis(x, d), "spatial position of a pooling or resize");
  for (size_t i = 1; i < op.args.size(); ++i)
    if (op.args[i].is_tensor()) graph.freeze_all(tensor_arg(op, i), "used as positions");
  for (const int32_t out : op.outs) {
    Labels labels(graph.rank(out));
    for (int d = 0; d < kept && d < graph.rank(out); ++d) labels[d] = graph.axis(x, d);
    graph.set(out, std::move(labels));
  }
}

int64_t pixel_factor(const Op& op) {
  const int64_t factor = int_arg(op, 1);
  if (factor < 1 || factor > 1024) throw std::out_of_range("pixel factor");
  return factor;
}

// pixel_shuffle(x, r): r * r consecutive channels make one.
void pixel_shuffle(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int channel = graph.rank(x) - 3;
  const int64_t factor = pixel_factor(op);
  Labels labels(graph.rank(x));
  for (int d = 0; d < channel; ++d) labels[d] = graph.axis(x, d);
  labels[channel] = graph.tie_runs(graph.axis(x, channel), factor * factor);
  for (int d = channel + 1; d < graph.rank(x); ++d)
    graph.freeze(graph.axis(x, d), "spatial position of a pixel shuffle");
  graph.set(op.outs[0], std::move(labels));
}

// pixel_unshuffle(x, r): each channel becomes r * r consecutive ones.
void pixel_unshuffle(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int channel = graph.rank(x) - 3;
  const int64_t factor = pixel_factor(op);
  Labels labels(graph.rank(x));
  for (int d = 0; d < channel; ++d) labels[d] = graph.axis(x, d);
  for (const Ids& layer : graph.axis(x, channel).layers) {
    std::vector<int32_t> ids;
    for (const int32_t id : *layer) ids.insert(ids.end(), factor * factor, id);
    labels[channel].layers.push_back(make_ids(std::move(ids)));
  }
  for (int d = channel + 1; d < graph.rank(x); ++d)
    graph.freeze(graph.axis(x, d), "spatial position of a pixel shuffle");
  graph.set(op.outs[0], std::move(labels));
}

// channel_shuffle(x, groups): position j of every group is tied, so that equal counts stay in every group.
void channel_shuffle(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int64_t groups = positive(int_arg(op, 1, 1));
  const int64_t width = graph.shape(x)[1] / groups;
  Labels labels = graph.labels_of(x);
  const Axis piece = graph.tie_pieces(labels[1], width);
  Axis shuffled;
  for (const Ids& layer : piece.layers) {
    std::vector<int32_t> ids;
    for (const int32_t id : *layer) ids.insert(ids.end(), groups, id);
    shuffled.layers.push_back(make_ids(std::move(ids)));
  }
  labels[1] = shuffled;
  graph.set(op.outs[0], std::move(labels));
}

// as_strided on a tensor of the same shape is a plain alias; anything else reads memory in its own order.
void as_strided(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  if (graph.shape(x) == graph.shape(op.outs[0])) {
    graph.set(op.outs[0], graph.labels_of(x));
    return;
  }
  graph.freeze_all(x, "viewed with explicit strides");
  graph.set(op.outs[0], Labels(graph.rank(op.outs[0])));
}

// glu(x, dim): the first half of dim is gated by the second.
void glu(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int dim = wrap_dim(int_arg(op, 1, -1), graph.rank(x));
  Labels labels = graph.labels_of(x);
  labels[dim] = graph.tie_pieces(labels[dim], graph.shape(x)[dim] / 2);
  graph.set(op.outs[0], std::move(labels));
}

}  // namespace

void add_shape_rules(RuleTable& table) {
  for (const char* name : {"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"})
    table[name] = view;
  table["permute"] = permute;
  table["t"] = t;
  table["transpose"] = transpose;
  table["unsqueeze"] = unsqueeze;
  table["squeeze"] = squeeze;
  table["expand"] = expand;
  table["repeat"] = repeat;
  for (const char* name : {"slice", "narrow"}) table[name] = slice;
  table["select"] = select;
  table["unfold"] = unfold;
  table["unbind"] = unbind;
  for (const char* name : {"split", "unsafe_split"}) table[name] = split;
  for (const char* name : {"split_with_sizes", "unsafe_split_with_sizes", "split_with_sizes_copy"})
    table[name] = split_with_sizes;
  table["cat"] = cat;
  table["stack"] = stack;
  table["constant_pad_nd"] = pad;
  for (const char* name : {"roll", "flip"}) table[name] = moved_by_literal;
  for (const char* name : {"cumsum", "cumprod"}) table[name] = cumulative;
  for (const char* name : {"max_pool2d_with_indices",
                           "max_pool3d_with_indices",
                           "avg_pool1d",
                           "avg_pool2d",
                           "avg_pool3d",
                           "_adaptive_avg_pool2d",
                           "_adaptive_avg_pool3d",
                           "adaptive_avg_pool1d",
                           "adaptive_max_pool2d",
                           "adaptive_max_pool3d",
                           "upsample_nearest1d",
                           "upsample_nearest2d",
                           "upsample_nearest3d",
                           "_upsample_nearest_exact1d",
                           "_upsample_nearest_exact2d",
                           "upsample_linear1d",
                           "upsample_bilinear2d",
                           "upsample_bicubic2d",
                           "upsample_trilinear3d",
                           "_upsample_bilinear2d_aa",
                           "_upsample_bicubic2d_aa",
                           "reflection_pad1d",
                           "reflection_pad2d",
                           "reflection_pad3d",
                           "replication_pad1d",
                           "replication_pad2d",
                           "replication_pad3d",
                           "grid_sampler_2d"})
    table[name] = spatial;
  table["pixel_shuffle"] = pixel_shuffle;
  table["pixel_unshuffle"] = pixel_unshuffle;
  for (const char* name : {"channel_shuffle", "native_channel_shuffle"}) table[name] = channel_shuffle;
  table["as_strided"] = as_strided;
  table["glu"] = glu;
}

}  // namespace stamp_fast
