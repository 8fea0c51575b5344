// Positions that are picked or written by an index tensor.
#include "rules.h"

namespace stamp_fast {
namespace {

// index_select(x, dim, index), and the gathered dim of index(x, [.., index, ..]) below.
void index_select(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  if (graph.rank(x) == 0) return;
  const int dim = wrap_dim(int_arg(op, 1), graph.rank(x));
  graph.freeze(graph.axis(x, dim), "positions are picked by an index tensor");
  graph.freeze_all(tensor_arg(op, 2), "used as an index");
  Labels labels = graph.labels_of(x);
  labels[dim] = {};
  graph.set(op.outs[0], std::move(labels));
}

// index(x, indices): dims without an index keep their labels where one index, or adjacent ones, are given.
void index(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int32_t out = op.outs[0];
  const std::vector<Value>& indices = op.args[1].list;
  int first = -1;
  int last = -1;
  bool adjacent = true;
  for (int d = 0; d < static_cast<int>(indices.size()); ++d) {
    if (!indices[d].is_tensor()) continue;
    graph.freeze_all(static_cast<int32_t>(indices[d].integer), "used as an index");
    graph.freeze(graph.axis(x, d), "positions are picked by an index tensor");
    if (first < 0)
      first = d;
    else if (d != last + 1)
      adjacent = false;
    last = d;
  }
  Labels labels(graph.rank(out));
  if (first < 0 || !adjacent || graph.rank(out) < graph.rank(x) - (last - first + 1)) {
    graph.freeze_all(x, "positions are picked by scattered index tensors");
  } else {
    for (int d = 0; d < first; ++d) labels[d] = graph.axis(x, d);
    for (int d = last + 1; d < graph.rank(x); ++d) labels[d - graph.rank(x) + graph.rank(out)] = graph.axis(x, d);
  }
  graph.set(out, std::move(labels));
}

// index_put(x, indices, values): the indexed dims stay; the others are those of the values.
void index_put(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int32_t values = tensor_arg(op, 2);
  Labels labels = graph.labels_of(x);
  const std::vector<Value>& indices = op.args[1].list;
  int indexed = 0;
  for (const Value& item : indices) {
    if (!item.is_tensor()) continue;
    graph.freeze_all(static_cast<int32_t>(item.integer), "used as an index");
    ++indexed;
  }
  const bool leading = indexed == static_cast<int>(indices.size());
  for (int d = 0; d < graph.rank(x); ++d) {
    const int from_end = graph.rank(x) - d;
    if (leading && d >= indexed && from_end <= graph.rank(values)) {
      const int v = graph.rank(values) - from_end;
      if (graph.shape(values)[v] > 1) labels[d] = graph.join(labels[d], graph.axis(values, v));
      continue;
    }
    graph.freeze(labels[d], "positions are written by an index tensor");
    labels[d] = {};
  }
  if (!leading) graph.freeze_all(values, "written by scattered index tensors");
  graph.set(op.outs[0], std::move(labels));
}

// embedding(weight, indices)
void embedding(Propagator& graph, const Op& op) {
  const int32_t weight = tensor_arg(op, 0);
  graph.freeze(graph.axis(weight, 0), "rows are looked up by an index tensor");
  graph.freeze_all(tensor_arg(op, 1), "used as an index");
  Labels labels(graph.rank(op.outs[0]));
  labels[labels.size() - 1] = graph.axis(weight, 1);
  graph.produce(weight, 1);
  graph.set(op.outs[0], std::move(labels));
}

// roi_align(x, rois, ...), roi_pool: one map of every channel for each region.
void regions(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  for (int d = 2; d < graph.rank(x); ++d) graph.freeze(graph.axis(x, d), "spatial position of a region of interest");
  graph.freeze_all(tensor_arg(op, 1), "used as positions");
  for (const int32_t out : op.outs) {
    Labels labels(graph.rank(out));
    labels[1] = graph.axis(x, 1);
    graph.set(out, std::move(labels));
  }
}

}  // namespace

void add_index_rules(RuleTable& table) {
  table["index_select"] = index_select;
  for (const char* name : {"index", "_unsafe_index"}) table[name] = index;
  for (const char* name : {"index_put", "_index_put_impl"}) table[name] = index_put;
  table["embedding"] = embedding;
  for (const char* name : {"roi_align", "roi_pool"}) table[name] = regions;
}

}  // namespace stamp_fast
