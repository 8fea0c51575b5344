// What a trace hands to the channel graph: tensors, operator calls and their arguments. No torch here.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace stamp_fast {

// A vector whose [] throws std::out_of_range: records come from outside, and no rule may read past what it is given.
template <typename T>
class Checked : public std::vector<T> {
 public:
  using std::vector<T>::vector;
  Checked(std::vector<T> values) : std::vector<T>(std::move(values)) {}
  T& operator[](size_t i) { return this->at(i); }
  const T& operator[](size_t i) const { return this->at(i); }
};

// More positions along labelled dims than this are no channels, and would not fit into memory.
constexpr int64_t kMaxPositions = int64_t{1} << 28;

// One operator argument, in schema order; defaults are already filled in by the tracer.
struct Value {
  enum class Kind { kNone, kBool, kInt, kFloat, kString, kTensor, kList };
  Kind kind = Kind::kNone;
  int64_t integer = 0;  // kBool, kInt, and the tensor index for kTensor
  double real = 0.0;
  std::string text;
  std::vector<Value> list;

  bool is_tensor() const { return kind == Kind::kTensor; }
  bool is_none() const { return kind == Kind::kNone; }
};

struct TensorInfo {
  Checked<int64_t> shape;
};

struct Op {
  std::string name;     // "aten.add_.Tensor"
  Checked<Value> args;  // in schema order
  Checked<int32_t> outs;
};

// Two dims of one size that the forward takes to be equal: their positions live or die together.
struct Tie {
  int32_t first = 0;
  int32_t first_dim = 0;
  int32_t second = 0;
  int32_t second_dim = 0;
};

struct Record {
  std::vector<TensorInfo> tensors;
  std::vector<Op> ops;
  int32_t num_slots = 0;           // tensors [0, num_slots) are the model's parameters and buffers
  std::vector<bool> is_parameter;  // per slot
  std::vector<int32_t> outputs;
  int32_t num_costed_ops = 0;   // operators [0, n) are one forward; the cost counts those alone
  std::vector<int32_t> pinned;  // slots that something outside the trace aliases
  std::vector<Tie> ties;
  std::vector<std::pair<int32_t, int32_t>> survivors;  // (reshape, axis of the block): which one survives a split
  std::vector<int32_t> batched;                        // inputs that grow with the batch
  int64_t batch = 1;                                   // examples in the recorded forward
};

// Throws std::invalid_argument where an index points nowhere or a size is no size. What operators do with their
// arguments is the rules' business: one that does not fit its arguments freezes them.
void validate(const Record& record);

}  // namespace stamp_fast
