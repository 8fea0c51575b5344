// The CUDA kernels, run on the host, and the CPU kernels against a plain loop.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/channel_saliency.h"
#include "kernels/cuda/channel_saliency.h"
#include "tests/cpp/check.h"
#include "tests/cpp/values.h"

namespace {

using stamp_fast::accumulator_t;
using stamp_fast::SaliencyInput;
using stamp_fast::widen;

template <typename T>
std::vector<accumulator_t<T>> on_cuda(const SaliencyInput& input) {
  std::vector<accumulator_t<T>> result(static_cast<size_t>(4 * input.channels), std::nanf(""));
  std::vector<double> scratch(static_cast<size_t>(stamp_fast::cuda::channel_saliency_scratch(input)) / 8, std::nan(""));
  CHECK(stamp_fast::cuda::channel_saliency(input, scratch.data(), result.data(), nullptr) == cudaSuccess);
  return result;
}

// In two parts of the images and two of the channels.
template <typename T>
std::vector<accumulator_t<T>> on_cpu(const SaliencyInput& input) {
  const auto columns = static_cast<size_t>(4 * input.channels);
  std::vector<accumulator_t<T>> result(columns, std::nanf(""));
  std::vector<double> sums(2 * columns, std::nan(""));
  const int64_t image = input.images / 2, channel = input.channels / 3;
  for (const bool late : {false, true}) {
    const int64_t begin = late ? image : 0, end = late ? input.images : image;
    double* to = sums.data() + (late ? columns : 0);
    stamp_fast::cpu::channel_saliency(input, begin, end, 0, channel, to);
    stamp_fast::cpu::channel_saliency(input, begin, end, channel, input.channels, to);
  }
  stamp_fast::cpu::channel_saliency_finish(input, 2, sums.data(), result.data());
  return result;
}

// `scales` are what the error of each element is measured by: sums of absolute values.
template <typename T>
void plain_loop(const SaliencyInput& input, std::vector<double>& wanted, std::vector<double>& scales) {
  const int64_t channels = input.channels;
  const auto count = double(std::max<int64_t>(input.images * input.positions(), 1));
  wanted.assign(static_cast<size_t>(4 * channels), 0.0);
  scales.assign(static_cast<size_t>(4 * channels), 0.0);
  for (int64_t c = 0; c < channels; ++c) {
    const auto at = [&](std::vector<double>& rows, int64_t row) -> double& { return rows[row * channels + c]; };
    for (int64_t n = 0; n < input.images; ++n) {
      double product = 0, absolute = 0;
      for (int64_t m = 0; m < input.outer; ++m) {
        for (int64_t k = 0; k < input.inner; ++k) {
          const int64_t place = ((n * input.outer + m) * channels + c) * input.inner + k;
          const double a = widen(static_cast<const T*>(input.activation)[place]);
          const double g = widen(static_cast<const T*>(input.gradient)[place]);
          product += a * g;
          absolute += std::abs(a * g);
          at(wanted, 2) += a;
          at(scales, 2) += std::abs(a);
          at(wanted, 3) += a == 0;
        }
      }
      at(wanted, 0) += std::abs(product);
      at(wanted, 1) += product * product / 2;
      at(scales, 0) += absolute;
      at(scales, 1) += absolute * absolute;
    }
    at(scales, 3) = count;
    for (const int64_t row : {2, 3}) {
      at(wanted, row) /= count;
      at(scales, row) /= count;
    }
  }
}

template <typename T>
void check(int64_t images, int64_t outer, int64_t channels, int64_t inner) {
  auto activation = random_values<T>(images * outer * channels * inner);
  const auto gradient = random_values<T>(images * outer * channels * inner);
  // Zeros of both signs.
  for (size_t i = 0; i < activation.size(); i += 3) activation[i] = stamp_fast::narrow<T>(i % 2 ? 0.0f : -0.0f);
  const SaliencyInput input{dtype_of<T>(), activation.data(), gradient.data(), images, outer, channels, inner};
  std::vector<double> wanted, scales;
  plain_loop<T>(input, wanted, scales);
  const double tolerance = std::is_same_v<T, double> ? 1e-14 : 2e-6;
  const auto cuda = on_cuda<T>(input), cpu = on_cpu<T>(input);
  for (size_t i = 0; i < wanted.size(); ++i) {
    CHECK(std::abs(cuda[i] - wanted[i]) <= tolerance * scales[i]);
    CHECK(std::abs(cpu[i] - wanted[i]) <= tolerance * scales[i]);
  }
}

template <typename T>
void check_shapes() {
  check<T>(1, 1, 1, 1);
  check<T>(3, 1, 5, 49);
  check<T>(3, 49, 5, 1);
  check<T>(4, 1, 7, 4);
  check<T>(4, 3, 7, 5);
  check<T>(2, 3, 5, 40);
  check<T>(13, 1, 29, 1);
  check<T>(1, 1, 11, 500);
  // Several parts of an image, and more channels than a tile.
  check<T>(2, 1, 2, 17001);
  check<T>(2, 70, 601, 1);
  check<T>(1, 2501, 3, 1);
  // More rows than blocks and threads.
  check<T>(130, 1, 130, 16);
  check<T>(300, 1, 900, 1);
  // Nothing to add.
  check<T>(0, 1, 4, 9);
  check<T>(0, 9, 4, 1);
  check<T>(3, 1, 0, 9);
  check<T>(3, 1, 4, 0);
  check<T>(3, 0, 4, 1);
  check<T>(3, 2, 4, 0);
  check<T>(3, 0, 4, 2);
}

void check_long_sums() {
  const std::vector<float> activation(1'000'003, 0.1f), gradient(activation.size(), 0.3f);
  for (const bool last : {false, true}) {
    const auto size = static_cast<int64_t>(activation.size());
    const SaliencyInput input{dtype_of<float>(), activation.data(), gradient.data(), 1, last ? size : 1, 1,
                              last ? 1 : size};
    for (const auto& result : {on_cuda<float>(input), on_cpu<float>(input)}) {
      CHECK(std::abs(result[2] / 0.1f - 1) < 1e-6f);
      CHECK(std::abs(result[0] / (double(0.1f) * double(0.3f) * double(size)) - 1) < 1e-6);
    }
  }
}

void check_not_a_number() {
  std::vector<float> activation(2 * 3 * 40, 1.0f);
  const std::vector<float> gradient(activation.size(), 1.0f);
  activation[40] = std::nanf("");
  const SaliencyInput input{dtype_of<float>(), activation.data(), gradient.data(), 2, 1, 3, 40};
  for (const auto& result : {on_cuda<float>(input), on_cpu<float>(input)}) {
    for (const int row : {0, 1, 2}) CHECK(std::isnan(result[3 * row + 1]) && !std::isnan(result[3 * row]));
    CHECK(result[3 * 3 + 1] == 0);
  }
}

// Past 2^32 elements, where no tensor needs to exist.
void check_addresses() {
  constexpr int64_t kImages = 70'000, kPositions = 1 << 11, kChannels = 64;
  const auto last = [&](int64_t outer, int64_t inner) {
    const SaliencyInput input{dtype_of<float>(), nullptr, nullptr, kImages, outer, kChannels, inner};
    return input.offset(kImages - 1, kChannels - 1, input.positions() - 1);
  };
  constexpr int64_t kLast = kImages * kPositions * kChannels - 1;
  static_assert(kLast > int64_t{1} << 32);
  CHECK(last(1, kPositions) == kLast && last(kPositions, 1) == kLast && last(kPositions / 8, 8) == kLast);
}

}  // namespace

int main() {
  check_shapes<float>();
  check_shapes<double>();
  check_shapes<stamp_fast::BFloat16>();
  check_shapes<stamp_fast::Float16>();
  check_long_sums();
  check_not_a_number();
  check_addresses();
}
