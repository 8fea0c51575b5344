// Operators that sum over channels with a weight, or with another activation.
#include "rules.h"

namespace stamp_fast {
namespace {

void freeze_from(Propagator& graph, int32_t tensor, int first, const std::string& reason) {
  for (int d = first; d < graph.rank(tensor); ++d) graph.freeze(graph.axis(tensor, d), reason);
}

Axis repeat(const Axis& axis, int64_t times) {
  Axis result;
  for (const Ids& layer : axis.layers) {
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < times; ++i) ids.insert(ids.end(), layer->begin(), layer->end());
    result.layers.push_back(make_ids(std::move(ids)));
  }
  return result;
}

// Convolution of one group: the weight's input dim is contracted with the activation's channels.
Axis dense_convolution(Propagator& graph, const Axis& x, int32_t weight, int in_dim, int out_dim) {
  graph.contract(x, graph.axis(weight, in_dim));
  graph.read(weight, in_dim, true);
  return graph.axis(weight, out_dim);
}

// A group of channels is removed whole, input and output side together; `groups` shrinks. Depthwise is the case of
// one channel a group. Not a reader: a group's output depends on its own inputs alone.
Axis whole_groups(Propagator& graph, const Axis& x, int32_t weight, int64_t groups, bool transposed) {
  const int64_t x_size = transposed ? graph.shape(weight)[0] : graph.shape(weight)[1] * groups;
  const Axis x_groups = graph.tie_runs(x, x_size / groups);
  const Axis w_groups = graph.tie_runs(graph.axis(weight, 0), graph.shape(weight)[0] / groups);
  const Axis joined = x_groups.rigid() && w_groups.rigid() ? w_groups : graph.join(x_groups, w_groups);
  graph.freeze(graph.axis(weight, 1), "width of one group of a grouped convolution");
  graph.derive_arg(8, joined);
  if (!transposed) return graph.axis(weight, 0);
  const int64_t out_per_group = graph.shape(weight)[1];
  Axis out;
  for (const Ids& layer : joined.layers) {
    std::vector<int32_t> ids;
    for (const int32_t id : *layer) ids.insert(ids.end(), out_per_group, id);
    out.layers.push_back(make_ids(std::move(ids)));
  }
  return out;
}

// Every group loses the channel at the same position; `groups` stays.
Axis same_position_in_groups(Propagator& graph, const Axis& x, int32_t weight, int64_t groups, bool transposed) {
  const int64_t w0 = graph.shape(weight)[0] / groups;
  const Axis rows = graph.tie_pieces(graph.axis(weight, 0), w0);
  if (transposed) {
    graph.contract(x, graph.axis(weight, 0));
    graph.read(weight, 0, true);
    return repeat(graph.axis(weight, 1), groups);
  }
  const int64_t in_per_group = graph.shape(weight)[1];
  const Axis piece = graph.tie_pieces(x, in_per_group);
  graph.contract(piece, graph.axis(weight, 1));
  graph.read(weight, 1, true);
  return graph.axis(weight, 0);
}

// convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
void convolution(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int32_t weight = tensor_arg(op, 1);
  const int32_t bias = tensor_arg(op, 2);
  const int32_t out = op.outs[0];
  const bool transposed = int_arg(op, 6) != 0;
  const int64_t groups = positive(int_arg(op, 8, 1));
  const int channel = graph.rank(x) - (graph.rank(weight) - 1);
  freeze_from(graph, weight, 2, "kernel position");
  freeze_from(graph, x, channel + 1, "spatial position of a convolution");
  const Axis x_channels = graph.axis(x, channel);

  Axis channels;
  if (groups == 1) {
    channels = dense_convolution(graph, x_channels, weight, transposed ? 0 : 1, transposed ? 1 : 0);
    graph.produce(weight, transposed ? 1 : 0);
  } else {
    const int64_t w0 = graph.shape(weight)[0] / groups;
    const int64_t w1 = graph.shape(weight)[1];
    const bool depthwise = (transposed ? w0 : w1) == 1;
    if (depthwise || groups > std::min(w0, w1))
      channels = whole_groups(graph, x_channels, weight, groups, transposed);
    else
      channels = same_position_in_groups(graph, x_channels, weight, groups, transposed);
    // A depthwise convolution emits its producer's channels, not its own.
    if (!depthwise) graph.produce(weight, transposed ? 1 : 0);
  }
  if (bias >= 0 && graph.shape(bias)[0] > 1) channels = graph.join(channels, graph.axis(bias, 0));
  Labels labels(graph.rank(out));
  if (channel == 1) labels[0] = graph.axis(x, 0);
  if (graph.shape(out)[channel] > 1) labels[channel] = channels;
  graph.set(out, std::move(labels));
}

// The operand that a mask scales: a parameter's where there is one, never both.
void read_one_operand(Propagator& graph, int32_t a, int a_dim, int32_t b, int b_dim) {
  if (graph.is_slot_view(a) && !graph.is_slot_view(b))
    graph.read(a, a_dim, true);
  else
    graph.read(b, b_dim, true);
}

void matrix_product(Propagator& graph, int32_t a, int32_t b, int32_t bias, int32_t out) {
  const int batch = graph.rank(out) - 2;
  Labels labels(graph.rank(out));
  for (int d = 0; d < batch; ++d) labels[d] = graph.join(graph.axis(a, d), graph.axis(b, d));
  if (!graph.is_slot_view(a) && !graph.is_slot_view(b)) {
    graph.mark_contracted(graph.axis(a, batch + 1), graph.axis(b, batch));
    // Where a split has made both a batch dim and a row or column, the batch dim is that of the heads.
    for (const int32_t t : {a, b})
      for (int d = 0; d < batch; ++d)
        for (int e = batch; e < batch + 2; ++e)
          if (graph.axis(t, d).unknown() && graph.axis(t, d).site == graph.axis(t, e).site)
            graph.mark_taken_apart(graph.axis(t, e));
  }
  graph.contract(graph.axis(a, batch + 1), graph.axis(b, batch));
  read_one_operand(graph, a, batch + 1, b, batch);
  labels[batch] = graph.axis(a, batch);
  labels[batch + 1] = graph.axis(b, batch + 1);
  if (graph.is_slot_view(b)) graph.produce(b, batch + 1);
  if (bias >= 0) {
    const int offset = graph.rank(out) - graph.rank(bias);
    for (int d = 0; d < graph.rank(bias); ++d)
      if (graph.shape(bias)[d] > 1) labels[d + offset] = graph.join(labels[d + offset], graph.axis(bias, d));
  }
  graph.set(out, std::move(labels));
}

// mm(a, b), bmm(a, b)
void product(Propagator& graph, const Op& op) {
  matrix_product(graph, tensor_arg(op, 0), tensor_arg(op, 1), -1, op.outs[0]);
}

// addmm(bias, a, b), baddbmm(bias, a, b)
void product_plus_bias(Propagator& graph, const Op& op) {
  matrix_product(graph, tensor_arg(op, 1), tensor_arg(op, 2), tensor_arg(op, 0), op.outs[0]);
}

// linear(x, weight, bias): weight is (out, in)
void linear(Propagator& graph, const Op& op) {
  const int32_t x = tensor_arg(op, 0);
  const int32_t weight = tensor_arg(op, 1);
  const int32_t bias = tensor_arg(op, 2);
  const int last = graph.rank(x) - 1;
  graph.contract(graph.axis(x, last), graph.axis(weight, 1));
  graph.read(weight, 1, true);
  Labels labels = graph.labels_of(x);
  labels[last] = graph.axis(weight, 0);
  graph.produce(weight, 0);
  if (bias >= 0) labels[last] = graph.join(labels[last], graph.axis(bias, 0));
  graph.set(op.outs[0], std::move(labels));
}

// Fused attention(q, k, v, ...) on (batch, heads, length, width).
void attention(Propagator& graph, const Op& op) {
  const int32_t q = tensor_arg(op, 0);
  const int32_t k = tensor_arg(op, 1);
  const int32_t v = tensor_arg(op, 2);
  const int rank = graph.rank(q);
  Labels labels(rank);
  for (int d = 0; d < rank - 2; ++d)
    labels[d] = graph.join(graph.join(graph.axis(q, d), graph.axis(k, d)), graph.axis(v, d));
  for (const int32_t t : {q, k}) {
    graph.freeze(graph.axis(t, rank - 1), "the width of a head sets the scale of fused attention");
    graph.freeze(graph.axis(t, rank - 2), "length of an attention sequence");
  }
  graph.freeze(graph.axis(v, rank - 2), "length of an attention sequence");
  labels[rank - 1] = graph.axis(v, rank - 1);
  for (const int32_t out : op.outs) graph.set(out, Labels(graph.rank(out)));
  graph.set(op.outs[0], std::move(labels));
}

}  // namespace

void add_contraction_rules(RuleTable& table) {
  table["convolution"] = convolution;
  table["mm"] = product;
  table["bmm"] = product;
  table["addmm"] = product_plus_bias;
  table["baddbmm"] = product_plus_bias;
  table["linear"] = linear;
  for (const char* name : {"scaled_dot_product_attention", "_scaled_dot_product_flash_attention",
                           "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
                           "_scaled_dot_product_attention_math"})
    table[name] = attention;
}

}  // namespace stamp_fast
