// The channel graph on hand-made records, without Python: groups, costs, shapes, and hostile sizes.
#include <vector>

#include "csrc/graph/channel_graph.h"
#include "tests/cpp/check.h"

namespace {

using namespace stamp_fast;  // a test of one library

Value tensor(int32_t index) {
  Value value;
  value.kind = Value::Kind::kTensor;
  value.integer = index;
  return value;
}

Value integer(int64_t number) {
  Value value;
  value.kind = Value::Kind::kInt;
  value.integer = number;
  return value;
}

Value boolean(bool truth) {
  Value value;
  value.kind = Value::Kind::kBool;
  value.integer = truth;
  return value;
}

Value list(std::vector<int64_t> numbers) {
  Value value;
  value.kind = Value::Kind::kList;
  for (const int64_t number : numbers) value.list.push_back(integer(number));
  return value;
}

Op convolution(int32_t x, int32_t weight, int32_t out, int64_t groups = 1) {
  return {"aten.convolution.default",
          {tensor(x), tensor(weight), Value{}, list({1, 1}), list({1, 1}), list({1, 1}), boolean(false), list({0, 0}),
           integer(groups)},
          {out}};
}

// conv(3 -> 8) -> relu -> depthwise -> conv(8 -> 8) -> add the first one -> conv(8 -> 4), the output
Record residual() {
  Record record;
  record.tensors = {{{8, 3, 3, 3}}, {{8, 1, 3, 3}}, {{8, 8, 3, 3}}, {{4, 8, 1, 1}},  // weights
                    {{2, 3, 6, 6}}, {{2, 8, 6, 6}}, {{2, 8, 6, 6}}, {{2, 8, 6, 6}},
                    {{2, 8, 6, 6}}, {{2, 8, 6, 6}}, {{2, 4, 6, 6}}};
  record.num_slots = 4;
  record.is_parameter = {true, true, true, true};
  record.ops = {convolution(4, 0, 5),
                {"aten.relu.default", {tensor(5)}, {6}},
                convolution(6, 1, 7, 8),
                convolution(7, 2, 8),
                {"aten.add.Tensor", {tensor(8), tensor(5), integer(1)}, {9}},
                convolution(9, 3, 10)};
  record.num_costed_ops = 6;
  record.outputs = {10};
  return record;
}

void test_residual_is_one_group() {
  const ChannelGraph graph(residual());
  CHECK(graph.num_classes() == 8);
  CHECK(graph.groups().size() == 1);
  CHECK(graph.groups()[0].slot == 0 && graph.groups()[0].dim == 0 && graph.groups()[0].channels == 8);
  CHECK(graph.frozen().size() == 1 && graph.frozen()[0].slot == 3);

  std::vector<uint8_t> keep(8, 1);
  const int64_t pixels = 2 * 6 * 6;
  CHECK(graph.cost(graph.macs_terms(), keep.data()) == pixels * (8 * 3 * 9 + 8 * 9 + 8 * 8 * 9 + 4 * 8));
  keep[0] = keep[5] = 0;
  CHECK(graph.cost(graph.macs_terms(), keep.data()) == pixels * (6 * 3 * 9 + 6 * 9 + 6 * 6 * 9 + 4 * 6));
  CHECK(graph.cost(graph.params_terms(), keep.data()) == 6 * 27 + 6 * 9 + 36 * 9 + 24);
  const auto shapes = graph.shapes(keep.data());
  CHECK((shapes[9] == std::vector<int64_t>{2, 6, 6, 6}));
  CHECK((shapes[1] == std::vector<int64_t>{6, 1, 3, 3}));
  CHECK(graph.scalar_args().size() == 1 && graph.scalar_args()[0].op == 2);
  CHECK(graph.live(graph.scalar_args()[0].axis, keep.data()) == 6);
  CHECK(graph.live_before(graph.axis_of(5, 1), 6, keep.data()) == 4);
}

void test_unknown_operator_freezes() {
  Record record = residual();
  record.ops[1].name = "aten.unheard_of.default";
  const ChannelGraph graph(record);
  CHECK(graph.groups().empty());
  bool named = false;
  for (const FreezeEvent& event : graph.events()) named |= event.reason.find("unheard_of") != std::string::npos;
  CHECK(named);
}

void test_reshape_blocks() {
  const auto blocks = reshape_blocks({2, 12, 1, 5}, {2, 3, 4, 5});
  CHECK(blocks.size() == 3);
  CHECK((blocks[1].from == std::vector<int>{1}) && (blocks[1].to == std::vector<int>{1, 2}));
  CHECK(reshape_blocks({0, 3}, {3, 0}).empty());
  CHECK(reshape_blocks({1, 1}, {1}).empty());
}

void test_pinned_slot_is_frozen() {
  Record record = residual();
  record.pinned = {0};
  const ChannelGraph graph(record);
  CHECK(graph.groups().empty());
}

}  // namespace

int main() {
  test_residual_is_one_group();
  test_unknown_operator_freezes();
  test_reshape_blocks();
  test_pinned_slot_is_frozen();
  return 0;
}
