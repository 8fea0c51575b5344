#include "rules.h"

#include <exception>

namespace stamp_fast {
namespace {

const RuleTable& rule_table() {
  static const RuleTable table = [] {
    RuleTable rows;
    add_contraction_rules(rows);
    add_norm_rules(rows);
    add_shape_rules(rows);
    add_index_rules(rows);
    add_elementwise_rules(rows);
    return rows;
  }();
  return table;
}

void freeze_arg(Propagator& graph, const Value& arg, const std::string& reason) {
  if (arg.is_tensor()) graph.freeze_all(static_cast<int32_t>(arg.integer), reason);
  for (const Value& item : arg.list) freeze_arg(graph, item, reason);
}

}  // namespace

std::string base_name(const std::string& name) {
  const size_t first = name.find('.');
  const size_t start = first == std::string::npos ? 0 : first + 1;
  std::string base = name.substr(start, name.find('.', start) - start);
  if (base.size() > 1 && base.back() == '_') base.pop_back();
  return base;
}

std::vector<int64_t> list_arg(const Op& op, size_t i) {
  std::vector<int64_t> values;
  if (i >= op.args.size()) return values;
  if (op.args[i].kind == Value::Kind::kInt) values.push_back(op.args[i].integer);
  for (const Value& item : op.args[i].list) values.push_back(item.integer);
  return values;
}

void apply_rule(Propagator& graph, const Op& op) {
  const auto row = rule_table().find(base_name(op.name));
  std::string reason = "no rule for operator " + op.name;
  if (row != rule_table().end() && (op.name.starts_with("aten.") || op.name.starts_with("torchvision."))) {
    try {
      row->second(graph, op);
      return;
    } catch (const std::exception& error) {
      // An overload that the rule was not written for: what it touches stays.
      reason = "the rule for operator " + op.name + " does not fit: " + error.what();
    }
  }
  for (const Value& arg : op.args) freeze_arg(graph, arg, reason);
  for (const int32_t out : op.outs) graph.set(out, Labels(graph.rank(out)));
}

}  // namespace stamp_fast
