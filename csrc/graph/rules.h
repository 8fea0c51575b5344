// The rule table: for every operator, how the labels of its inputs become the labels of its outputs.
// One rule a function; an operator without a rule freezes what it touches.
#pragma once

#include <stdexcept>
#include <string>
#include <unordered_map>

#include "propagate.h"

namespace stamp_fast {

using Rule = void (*)(Propagator&, const Op&);
using RuleTable = std::unordered_map<std::string, Rule>;

// "aten.add_.Tensor" -> "add": the name that the table is keyed by.
std::string base_name(const std::string& name);
void apply_rule(Propagator& graph, const Op& op);

// Each file of rules adds its own rows.
void add_contraction_rules(RuleTable& table);
void add_norm_rules(RuleTable& table);
void add_shape_rules(RuleTable& table);
void add_index_rules(RuleTable& table);
void add_elementwise_rules(RuleTable& table);

// --- reading arguments -----------------------------------------------------------------------------------------
inline int32_t tensor_arg(const Op& op, size_t i) {
  return i < op.args.size() && op.args[i].is_tensor() ? static_cast<int32_t>(op.args[i].integer) : -1;
}
inline int64_t int_arg(const Op& op, size_t i, int64_t otherwise = 0) {
  return i < op.args.size() && op.args[i].kind != Value::Kind::kNone ? op.args[i].integer : otherwise;
}
std::vector<int64_t> list_arg(const Op& op, size_t i);
inline int wrap_dim(int64_t dim, int rank) {
  if (dim < -rank || dim >= rank) throw std::out_of_range("there is no dim " + std::to_string(dim));
  return static_cast<int>(dim < 0 ? dim + rank : dim);
}
// A number of groups or the size of a piece: something to divide and to multiply by.
inline int64_t positive(int64_t number) {
  if (number < 1 || number > (1 << 20)) throw std::out_of_range("a number of parts is " + std::to_string(number));
  return number;
}

}  // namespace stamp_fast
