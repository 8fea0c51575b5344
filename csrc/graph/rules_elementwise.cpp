// Operators that work position by position, with broadcasting, and factories of constant tensors.
#include "rules.h"

namespace stamp_fast {
namespace {

// Every tensor argument meets every other one, aligned at the last dim. A dim of size 1, or a missing one, says
// nothing.
void elementwise(Propagator& graph, const Op& op) {
  if (op.outs.empty()) return;
  const int32_t out = op.outs[0];
  const int rank = graph.rank(out);
  Labels labels(rank);
  std::vector<bool> seen(rank, false);
  for (const Value& arg : op.args) {
    if (!arg.is_tensor()) continue;
    const auto t = static_cast<int32_t>(arg.integer);
    const int offset = rank - graph.rank(t);
    for (int d = std::max(0, -offset); d < graph.rank(t); ++d) {
      const int o = d + offset;
      if (graph.shape(t)[d] == 1) continue;
      labels[o] = seen[o] ? graph.join(labels[o], graph.axis(t, d)) : graph.axis(t, d);
      seen[o] = true;
    }
  }
  for (const int32_t other : op.outs)
    if (graph.rank(other) == rank) graph.set(other, labels);
}

// A plain copy or cast is still a view of the same parameter as far as channels go.
void copy_of(Propagator& graph, const Op& op) {
  elementwise(graph, op);
  const int32_t t = tensor_arg(op, 0);
  if (t >= 0 && op.outs[0] != t) graph.set_origin(op.outs[0], graph.origin(t));
}

// A constant of any size: its dims follow whatever they meet. That the size was not a literal is checked by replay.
void factory(Propagator& graph, const Op& op) {
  for (size_t k = 0; k < op.outs.size(); ++k) {
    Labels labels;
    for (int d = 0; d < graph.rank(op.outs[k]); ++d)
      labels.push_back(graph.fresh(static_cast<int>(k), d, graph.shape(op.outs[k])[d]));
    graph.set(op.outs[k], std::move(labels));
  }
}

// Values that depend on the position.
void ordered_factory(Propagator& graph, const Op& op) {
  for (const int32_t out : op.outs) graph.set(out, Labels(graph.rank(out)));
}

}  // namespace

void add_elementwise_rules(RuleTable& table) {
  for (const char* name : {"abs",          "neg",
                           "exp",          "exp2",
                           "expm1",        "log",
                           "log2",         "log10",
                           "log1p",        "sqrt",
                           "rsqrt",        "square",
                           "sin",          "cos",
                           "tan",          "asin",
                           "acos",         "atan",
                           "atan2",        "sinh",
                           "cosh",         "tanh",
                           "erf",          "erfc",
                           "sign",         "sgn",
                           "floor",        "ceil",
                           "round",        "trunc",
                           "frac",         "reciprocal",
                           "pow",          "sigmoid",
                           "logit",        "relu",
                           "relu6",        "hardtanh",
                           "hardswish",    "hardsigmoid",
                           "hardshrink",   "softshrink",
                           "leaky_relu",   "rrelu_with_noise",
                           "elu",          "celu",
                           "selu",         "silu",
                           "gelu",         "mish",
                           "softplus",     "log_sigmoid_forward",
                           "threshold",    "_prelu_kernel",
                           "prelu",        "clamp",
                           "clamp_min",    "clamp_max",
                           "clip",         "add",
                           "sub",          "rsub",
                           "mul",          "multiply",
                           "div",          "true_divide",
                           "floor_divide", "remainder",
                           "fmod",         "maximum",
                           "minimum",      "fmax",
                           "fmin",         "hypot",
                           "lerp",         "addcmul",
                           "addcdiv",      "where",
                           "masked_fill",  "eq",
                           "ne",           "lt",
                           "le",           "gt",
                           "ge",           "logical_and",
                           "logical_or",   "logical_not",
                           "logical_xor",  "bitwise_and",
                           "bitwise_or",   "bitwise_not",
                           "bitwise_xor",  "isnan",
                           "isinf",        "isfinite",
                           "nan_to_num",   "native_dropout",
                           "bernoulli",    "fill",
                           "zero",         "normal",
                           "uniform",      "exponential",
                           "zeros_like",   "ones_like",
                           "empty_like",   "full_like",
                           "rand_like",    "randn_like",
                           "copy"})
    table[name] = elementwise;
  for (const char* name : {"alias", "detach", "clone", "_to_copy", "contiguous", "lift_fresh", "view_as"})
    table[name] = copy_of;
  for (const char* name : {"zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full",
                           "new_empty", "empty_strided", "new_empty_strided", "scalar_tensor"})
    table[name] = factory;
  for (const char* name :
       {"arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices", "randint", "randperm"})
    table[name] = ordered_factory;
}

}  // namespace stamp_fast
