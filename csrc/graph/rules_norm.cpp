// Normalisation, reductions and softmax: operators that look at many positions of a dim at once.
#include "rules.h"

namespace stamp_fast {
namespace {

// batch_norm(x, weight, bias, running_mean, running_var, ...): statistics per channel (dim 1) over everything else.
void batch_norm(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  Labels labels = graph.labels_of(x);
  for (size_t i = 1; i < 5; ++i) {
    const int32_t t = tensor_arg(op, i);
    if (t >= 0 && graph.rank(t) == 1 && graph.shape(t)[0] > 1) labels[1] = graph.join(labels[1], graph.axis(t, 0));
  }
  const bool batch_statistics =
      base_name(op.name) != "_native_batch_norm_legit_no_training" &&
      (op.args.size() < 6 || op.args[5].kind != Value::Kind::kBool || op.args[5].integer != 0);
  if (batch_statistics)
    for (int d = 0; d < graph.rank(x); ++d)
      if (d != 1) graph.read(x, d, false);
  graph.set(op.outs[0], labels);
  for (size_t k = 1; k < op.outs.size(); ++k) {
    const int32_t out = op.outs[k];
    Labels statistics(graph.rank(out));
    if (graph.rank(out) == 1 && graph.shape(out)[0] == graph.shape(x)[1]) statistics[0] = labels[1];
    graph.set(out, std::move(statistics));
  }
}

// native_layer_norm(x, normalized_shape, weight, bias, eps): the mean is over the live channels, hence inexact.
void layer_norm(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int normalized = static_cast<int>(list_arg(op, 1).size());
  const int first = graph.rank(x) - normalized;
  Labels labels = graph.labels_of(x);
  for (const size_t i : {2, 3}) {
    const int32_t t = tensor_arg(op, i);
    if (t < 0 || graph.rank(t) != normalized) continue;
    for (int d = 0; d < normalized; ++d)
      if (graph.shape(t)[d] > 1) labels[first + d] = graph.join(labels[first + d], graph.axis(t, d));
  }
  for (int d = first; d < graph.rank(x); ++d) graph.read(x, d, false);
  graph.set(op.outs[0], labels);
  for (size_t k = 1; k < op.outs.size(); ++k) {
    Labels statistics(graph.rank(op.outs[k]));
    for (int d = 0; d < first && d < graph.rank(op.outs[k]); ++d) statistics[d] = labels[d];
    graph.set(op.outs[k], std::move(statistics));
  }
}

// native_group_norm(x, weight, bias, N, C, HxW, group, eps)
void group_norm(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int64_t channels = graph.shape(x)[1];
  const int64_t groups = positive(int_arg(op, 6, 1));
  const int64_t width = channels / groups;
  Labels labels = graph.labels_of(x);
  for (const size_t i : {1, 2}) {
    const int32_t t = tensor_arg(op, i);
    if (t >= 0 && channels > 1) labels[1] = graph.join(labels[1], graph.axis(t, 0));
  }
  Axis live_groups;
  if (groups > width) {
    // Whole groups go: the statistics of the others do not notice.
    live_groups = graph.tie_runs(labels[1], width);
    graph.derive_arg(6, live_groups);
  } else {
    graph.tie_pieces(labels[1], width);
    graph.read(x, 1, false);
  }
  graph.derive_arg(4, labels[1]);
  for (int d = 2; d < graph.rank(x); ++d) graph.freeze(graph.axis(x, d), "spatial position of a group norm");
  graph.set(op.outs[0], std::move(labels));
  for (size_t k = 1; k < op.outs.size(); ++k) {
    Labels statistics(graph.rank(op.outs[k]));  // (N, group)
    if (statistics.size() == 2 && groups > 1) statistics[1] = live_groups;
    graph.set(op.outs[k], std::move(statistics));
  }
}

// _weight_norm_interface(v, g, dim): each slice of v along dim is scaled to the length that g gives. The length is that
// of the live part, hence inexact along the other dims.
void weight_norm(Propagator& graph, const Op& op) {
  const int32_t v = tensor_arg(op, 0);
  const int32_t g = tensor_arg(op, 1);
  const int dim = wrap_dim(int_arg(op, 2), graph.rank(v));
  Labels labels = graph.labels_of(v);
  for (int d = 0; d < graph.rank(v); ++d) {
    if (d != dim)
      graph.read(v, d, false);
    else if (graph.shape(v)[d] > 1)
      labels[d] = graph.join(labels[d], graph.axis(g, d));
  }
  Labels lengths(graph.rank(op.outs[1]));
  lengths.at(dim) = labels[dim];
  graph.set(op.outs[0], std::move(labels));
  graph.set(op.outs[1], std::move(lengths));
}

// softmax(x, dim, ...): normalises over the live positions of dim. Where some of them can never go they are classes of
// an output, and then so are the others (the background of a detector).
void softmax(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  if (graph.rank(x) > 0) {
    const int dim = wrap_dim(int_arg(op, 1), graph.rank(x));
    graph.read(x, dim, false);
    if (graph.partly_frozen(graph.axis(x, dim)))
      graph.freeze(graph.axis(x, dim), "in one softmax with positions that cannot be cut");
  }
  graph.set(op.outs[0], graph.labels_of(x));
}

// The dims in `dims` (all if empty) of the input disappear, or shrink to 1.
void reduce_dims(Propagator& graph, const Op& op, std::vector<int64_t> dims, bool exact) {
  const int32_t x = tensor_arg(op, 0);
  const int rank = graph.rank(x);
  std::vector<bool> reduced(rank, dims.empty());
  for (const int64_t d : dims) reduced[wrap_dim(d, rank)] = true;
  for (size_t k = 0; k < op.outs.size(); ++k) {
    const int32_t out = op.outs[k];
    const bool keepdim = graph.rank(out) == rank;
    Labels labels;
    for (int d = 0; d < rank; ++d) {
      if (!reduced[d])
        labels.push_back(graph.axis(x, d));
      else if (keepdim)
        labels.push_back({});
    }
    graph.set(out, std::move(labels));
  }
  for (int d = 0; d < rank; ++d)
    if (reduced[d]) graph.read(x, d, exact);
}

void sum(Propagator& graph, const Op& op) {
  // A sum with a dtype only has that at position 1.
  reduce_dims(graph, op, list_arg(op, 1), true);
}

void mean_like(Propagator& graph, const Op& op) { reduce_dims(graph, op, list_arg(op, 1), false); }

// linalg_vector_norm(x, ord, dim, ...), norm(x, p, dim, ...)
void vector_norm(Propagator& graph, const Op& op) { reduce_dims(graph, op, list_arg(op, 2), false); }

// max(x, dim): the index that comes along has no meaning in a smaller tensor.
void max_with_index(Propagator& graph, const Op& op) {
  if (op.outs.size() > 1 && graph.is_used(op.outs[1])) {
    const int32_t x = tensor_arg(op, 0);
    graph.freeze(graph.axis(x, wrap_dim(int_arg(op, 1), graph.rank(x))), "the index of a maximum is used");
  }
  reduce_dims(graph, op, list_arg(op, 1), false);
}

}  // namespace

void add_norm_rules(RuleTable& table) {
  for (const char* name :
       {"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
        "_native_batch_norm_legit_functional", "cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update"})
    table[name] = batch_norm;
  table["native_layer_norm"] = layer_norm;
  table["native_group_norm"] = group_norm;
  table["_weight_norm_interface"] = weight_norm;
  for (const char* name : {"_softmax", "_log_softmax", "_safe_softmax"}) table[name] = softmax;
  table["sum"] = sum;
  for (const char* name : {"mean", "amax", "amin", "var", "std", "logsumexp", "any", "all", "prod"})
    table[name] = mean_like;
  for (const char* name : {"linalg_vector_norm", "norm"}) table[name] = vector_norm;
  for (const char* name : {"max", "min"}) table[name] = max_with_index;
}

}  // namespace stamp_fast
