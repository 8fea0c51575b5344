// Any bytes as an operator record: what tests/fuzz/records.py writes, and whatever a fuzzer makes of it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "csrc/graph/record.h"

namespace stamp_fast {

class RecordReader {
 public:
  RecordReader(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  Record read() {
    Record record;
    record.tensors.resize(count());
    for (TensorInfo& tensor : record.tensors) tensor.shape = numbers<int64_t>();
    for (const int64_t flag : numbers<int64_t>()) record.is_parameter.push_back(flag != 0);
    record.num_slots = static_cast<int32_t>(record.is_parameter.size());
    record.outputs = numbers<int32_t>();
    record.pinned = numbers<int32_t>();
    const std::vector<int32_t> ties = numbers<int32_t>();
    for (size_t i = 0; i + 3 < ties.size(); i += 4)
      record.ties.push_back({ties[i], ties[i + 1], ties[i + 2], ties[i + 3]});
    record.num_costed_ops = static_cast<int32_t>(number());
    record.ops.resize(count());
    for (Op& op : record.ops) {
      const size_t length = count();
      op.name.assign(at_, at_ + length);
      at_ += length;
      op.args.resize(count());
      for (Value& arg : op.args) arg = value(0);
      op.outs = numbers<int32_t>();
    }
    return record;
  }

  // Seven bits a byte, low ones first, then zigzag; zeros behind the end.
  int64_t number() {
    uint64_t bits = 0;
    for (int shift = 0; shift < 64 && at_ < end_; shift += 7) {
      const uint8_t byte = *at_++;
      bits |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) break;
    }
    return static_cast<int64_t>(bits >> 1) ^ -static_cast<int64_t>(bits & 1);
  }

 private:
  // Of things that take a byte at least.
  size_t count() {
    const int64_t wanted = number();
    return static_cast<size_t>(std::clamp<int64_t>(wanted, 0, end_ - at_));
  }

  template <typename T>
  std::vector<T> numbers() {
    std::vector<T> values(count());
    for (T& value : values) value = static_cast<T>(number());
    return values;
  }

  Value value(int depth) {
    Value result;
    result.kind = static_cast<Value::Kind>(static_cast<uint64_t>(number()) % 7);
    if (result.kind == Value::Kind::kBool || result.kind == Value::Kind::kInt || result.kind == Value::Kind::kTensor)
      result.integer = number();
    if (result.kind == Value::Kind::kList && depth < 20) {
      result.list.resize(count());
      for (Value& item : result.list) item = value(depth + 1);
    }
    return result;
  }

  const uint8_t* at_;
  const uint8_t* end_;
};

}  // namespace stamp_fast
