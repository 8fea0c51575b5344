// A hostile operator record: the channel graph answers every question about it, or refuses it with an exception.
// The entry point is libFuzzer's; without libFuzzer, fuzz_main.cpp calls it.
#include <cstdint>
#include <exception>
#include <vector>

#include "csrc/graph/channel_graph.h"
#include "tests/cpp/fuzz_reader.h"

using namespace stamp_fast;  // a test of one library

namespace {

// Large sizes are slow, which is no fault. Beyond the limits that the graph sets itself they are refused at once.
bool is_slow(const Record& record) {
  int64_t positions = 0;
  for (const TensorInfo& tensor : record.tensors) {
    int64_t elements = 1;
    for (const int64_t size : tensor.shape) {
      if (size < 0 || size > kMaxPositions) return false;
      positions += size;
      elements *= size > 0 ? size : 1;
      if (elements > kMaxPositions) return false;
    }
    if (elements > 1 << 14) return true;
  }
  return positions > 1 << 14;
}

int64_t ask(const ChannelGraph& graph, const std::vector<uint8_t>& keep) {
  int64_t sum = graph.cost(graph.macs_terms(), keep.data()) ^ graph.cost(graph.params_terms(), keep.data());
  for (const auto& shape : graph.shapes(keep.data())) sum += static_cast<int64_t>(shape.size());
  for (const ScalarArg& arg : graph.scalar_args()) sum += graph.live(arg.axis, keep.data());
  for (size_t axis = 0; axis < graph.axes().size(); ++axis)
    sum += graph.live_before(static_cast<int32_t>(axis), 3, keep.data());
  for (const ClassRead& read : graph.reads()) sum += graph.axis_of(read.tensor, read.dim);
  for (size_t t = 0; t < graph.record().tensors.size(); ++t) {
    sum += static_cast<int64_t>(graph.groups_of(static_cast<int32_t>(t)).size());
    sum += graph.is_slot_view(static_cast<int32_t>(t));
  }
  for (int32_t slot = 0; slot < graph.record().num_slots; ++slot)
    for (size_t d = 0; d < graph.record().tensors[slot].shape.size(); ++d)
      sum += graph.freeze_event(slot, static_cast<int>(d));
  for (const FreezeEvent& event : graph.events()) sum += static_cast<int64_t>(event.reason.size());
  return sum;
}

}  // namespace

// Whether the record was refused.
bool refused_record(const uint8_t* data, size_t size) {
  Record record = RecordReader(data, size).read();
  if (is_slow(record)) return false;
  try {
    const ChannelGraph graph(std::move(record));
    std::vector<uint8_t> keep(graph.num_classes(), 1);
    volatile int64_t sum = ask(graph, keep);
    for (size_t i = 0; i < keep.size(); i += 2) keep[i] = 0;
    sum = ask(graph, keep);
    (void)sum;
  } catch (const std::exception&) {
    return true;
  }
  return false;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  refused_record(data, size);
  return 0;
}
