#include "kernels/cpu/channel_saliency.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "csrc/channel_saliency.h"
#include "csrc/cpu/parallel.h"

namespace stamp_fast {
namespace {

using cpu::kGrain;

// Bound the memory for partial sums, and depend on the sizes alone: so does the order of the sums.
constexpr int64_t kMaxPieces = 64;
constexpr int64_t kElementsPerSum = 16;
// Threads should not share cache lines.
constexpr int64_t kMinChannels = 16;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor channel_saliency(const Tensor& activation, const Tensor& gradient, int64_t dim) {
  const SaliencyTensors tensors = saliency_tensors(activation, gradient, dim);
  const SaliencyInput& input = tensors.input;
  Tensor result = new_saliency(tensors);
  if (input.channels == 0) return result;

  const int64_t per_channel = input.images * input.positions();
  const int64_t pieces = std::clamp<int64_t>(per_channel * input.channels / kGrain, 1, kMaxPieces);
  const int64_t most_parts = std::max<int64_t>(std::min({input.images, pieces, per_channel / kElementsPerSum}), 1);
  const int64_t image_step = std::max<int64_t>(ceil_divide(input.images, most_parts), 1);
  const int64_t image_parts = ceil_divide(input.images, image_step);
  const int64_t channel_step = std::max(ceil_divide(input.channels * most_parts, pieces), kMinChannels);

  struct Piece {
    int64_t part, channel_begin;
  };
  std::vector<double> sums(static_cast<size_t>(image_parts * 4 * input.channels));
  std::vector<Piece> list;
  cpu::WorkList work;
  for (int64_t part = 0; part < image_parts; ++part) {
    for (int64_t c = 0; c < input.channels; c += channel_step) {
      list.push_back({part, c});
      work.add(image_step * input.positions() * channel_step);
    }
  }
  work.run([&](int64_t i) {
    const auto [part, channel_begin] = list[static_cast<size_t>(i)];
    cpu::channel_saliency(input, part * image_step, std::min((part + 1) * image_step, input.images), channel_begin,
                          std::min(channel_begin + channel_step, input.channels),
                          sums.data() + part * 4 * input.channels);
  });
  cpu::channel_saliency_finish(input, image_parts, sums.data(), result.mutable_data_ptr());
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(stamp_fast, CPU, m) { m.impl("channel_saliency", TORCH_BOX(&channel_saliency)); }

}  // namespace
}  // namespace stamp_fast
