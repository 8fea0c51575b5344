#include "record.h"

#include <stdexcept>

namespace stamp_fast {
namespace {

constexpr int64_t kMaxElements = int64_t{1} << 40;
constexpr int kMaxDepth = 8;

void require(bool fits, const std::string& what) {
  if (!fits) throw std::invalid_argument("channel graph: " + what);
}

template <typename T>
bool within(T index, size_t size) {
  return index >= 0 && static_cast<uint64_t>(index) < size;
}

void check_value(const Value& value, size_t num_tensors, const std::string& op, int depth) {
  require(depth < kMaxDepth, "the arguments of " + op + " are nested too deeply");
  require(
      !value.is_tensor() || within(value.integer, num_tensors),
      "an argument of " + op + " is tensor " + std::to_string(value.integer) + " of " + std::to_string(num_tensors));
  for (const Value& item : value.list) check_value(item, num_tensors, op, depth + 1);
}

void check_shape(const TensorInfo& tensor) {
  int64_t elements = 1;
  for (const int64_t size : tensor.shape) {
    require(size >= 0, "a tensor has a dimension of size " + std::to_string(size));
    // A dim of size 0 must not hide the others, whose products are taken as well; it may count as one of 2.
    const int64_t counted = size == 0 ? 2 : size;
    require(elements <= kMaxElements / counted, "a tensor has more than 2^40 elements");
    elements *= counted;
  }
}

}  // namespace

void validate(const Record& record) {
  const size_t n = record.tensors.size();
  require(within(record.num_slots, n + 1), "more parameters and buffers than tensors");
  require(record.is_parameter.size() == static_cast<size_t>(record.num_slots), "is_parameter needs one flag a slot");
  int64_t positions = 0;
  for (size_t t = 0; t < n; ++t) {
    check_shape(record.tensors[t]);
    if (t >= static_cast<size_t>(record.num_slots)) continue;
    for (const int64_t size : record.tensors[t].shape) {
      positions += size;
      require(positions <= kMaxPositions, "the dims of the parameters have more than 2^28 positions");
    }
  }
  for (const Op& op : record.ops) {
    require(!op.outs.empty(), op.name + " has no output");
    for (const int32_t out : op.outs) require(within(out, n), "an output of " + op.name + " is no tensor");
    for (const Value& arg : op.args) check_value(arg, n, op.name, 0);
  }
  require(within(record.num_costed_ops, record.ops.size() + 1), "more operators to be costed than there are");
  for (const int32_t t : record.outputs) require(within(t, n), "an output of the model is no tensor");
  for (const int32_t t : record.pinned) require(within(t, record.num_slots), "a pinned slot is no slot");
  for (const int32_t t : record.batched) require(within(t, n), "a batched input is no tensor");
  require(record.batch >= 1, "the batch is empty");
  for (const Tie& tie : record.ties) {
    require(within(tie.first, n) && within(tie.second, n), "a tie names no tensor");
    const auto& first = record.tensors[tie.first].shape;
    const auto& second = record.tensors[tie.second].shape;
    require(within(tie.first_dim, first.size()) && within(tie.second_dim, second.size()), "a tie names no dim");
    require(first[tie.first_dim] == second[tie.second_dim], "only dims of one size can be tied");
  }
}

}  // namespace stamp_fast
