// The CUDA kernels, run on the host, against a plain loop.
#include <array>
#include <cmath>
#include <vector>

#include "kernels/cuda/depthwise_conv2d.h"
#include "tests/cpp/check.h"
#include "tests/cpp/values.h"

namespace {

using stamp_fast::DepthwiseConv;
using stamp_fast::ImageBatch;
using stamp_fast::narrow;
using stamp_fast::widen;
using stamp_fast::Window;

DepthwiseConv make_conv(int64_t images, int64_t channels, int64_t height, int64_t width, Window y, Window x) {
  const auto outputs = [](int64_t size, const Window& window) {
    return (size + 2 * window.padding - window.dilation * (window.size - 1) - 1) / window.stride + 1;
  };
  return {.dtype = stamp_fast::DType::kFloat32,
          .input = {images, channels, height, width, false},
          .output = {images, channels, outputs(height, y), outputs(width, x), false},
          .y = y,
          .x = x};
}

int64_t element(const ImageBatch& batch, int64_t image, int64_t channel, int64_t y, int64_t x) {
  const int64_t c = batch.channels, h = batch.height, w = batch.width;
  return batch.channels_last ? ((image * h + y) * w + x) * c + channel : ((image * c + channel) * h + y) * w + x;
}

// Calls function(place of the output, of the input, of the weight) for every product in the convolution.
template <typename Function>
void each_product(const DepthwiseConv& conv, const Function& function) {
  const ImageBatch& out = conv.output;
  for (int64_t n = 0; n < out.images; ++n) {
    for (int64_t c = 0; c < out.channels; ++c) {
      for (int64_t oy = 0; oy < out.height; ++oy) {
        for (int64_t ox = 0; ox < out.width; ++ox) {
          for (int64_t j = 0; j < conv.y.size; ++j) {
            for (int64_t i = 0; i < conv.x.size; ++i) {
              const int64_t y = oy * conv.y.stride - conv.y.padding + j * conv.y.dilation;
              const int64_t x = ox * conv.x.stride - conv.x.padding + i * conv.x.dilation;
              if (y < 0 || y >= conv.input.height || x < 0 || x >= conv.input.width) continue;
              function(element(out, n, c, oy, ox), element(conv.input, n, c, y, x),
                       (c * conv.y.size + j) * conv.x.size + i);
            }
          }
        }
      }
    }
  }
}

// Error of a sum is measured by the sum of absolute values; the result's own rounding comes on top.
template <typename T>
void check_close(const std::vector<T>& actual, const std::vector<double>& wanted, const std::vector<double>& sizes) {
  const double sum = std::is_same_v<T, double> ? 1e-14 : 1e-6;
  const double rounding = sizeof(T) > 2 ? 0 : std::is_same_v<T, stamp_fast::BFloat16> ? 1.0 / 256 : 1.0 / 2048;
  for (size_t i = 0; i < actual.size(); ++i) {
    CHECK(std::abs(widen(actual[i]) - wanted[i]) <= sum * (sizes[i] + 1) + rounding * std::abs(wanted[i]));
  }
}

template <typename T>
void check(DepthwiseConv conv, bool channels_last) {
  conv.dtype = dtype_of<T>();
  conv.input.channels_last = conv.output.channels_last = channels_last;
  const auto input = random_values<T>(conv.input.images * conv.input.image_size());
  const auto grad = random_values<T>(conv.output.images * conv.output.image_size());
  const auto weight = random_values<T>(conv.input.channels * conv.y.size * conv.x.size);
  const T poison = narrow<T>(std::nanf(""));
  std::vector<T> output(grad.size(), poison), input_grad(input.size(), poison), weight_grad(weight.size(), poison);
  std::vector<double> scratch(
      static_cast<size_t>(stamp_fast::cuda::depthwise_conv2d_backward_weight_scratch(conv) + 7) / 8, std::nan(""));
  CHECK(stamp_fast::cuda::depthwise_conv2d(conv, input.data(), weight.data(), output.data(), nullptr) == cudaSuccess);
  CHECK(stamp_fast::cuda::depthwise_conv2d_backward_input(conv, grad.data(), weight.data(), input_grad.data(),
                                                          nullptr) == cudaSuccess);
  CHECK(stamp_fast::cuda::depthwise_conv2d_backward_weight(conv, grad.data(), input.data(), scratch.data(),
                                                           weight_grad.data(), nullptr) == cudaSuccess);

  std::vector<double> wanted(output.size()), wanted_input(input.size()), wanted_weight(weight.size());
  std::vector<double> sizes(output.size()), sizes_input(input.size()), sizes_weight(weight.size());
  each_product(conv, [&](int64_t out, int64_t in, int64_t tap) {
    const double a = widen(input[in]), g = widen(grad[out]), w = widen(weight[tap]);
    wanted[out] += a * w;
    sizes[out] += std::abs(a * w);
    wanted_input[in] += g * w;
    sizes_input[in] += std::abs(g * w);
    wanted_weight[tap] += g * a;
    sizes_weight[tap] += std::abs(g * a);
  });
  check_close(output, wanted, sizes);
  check_close(input_grad, wanted_input, sizes_input);
  check_close(weight_grad, wanted_weight, sizes_weight);
}

template <typename T>
void check_shapes() {
  for (const bool last : {false, true}) {
    check<T>(make_conv(1, 1, 1, 1, {1, 1, 0, 1}, {1, 1, 0, 1}), last);
    check<T>(make_conv(2, 5, 7, 11, {3, 1, 1, 1}, {3, 1, 1, 1}), last);
    check<T>(make_conv(2, 5, 8, 11, {3, 2, 1, 1}, {3, 2, 1, 1}), last);
    check<T>(make_conv(2, 3, 9, 8, {5, 2, 2, 1}, {5, 2, 2, 1}), last);
    check<T>(make_conv(3, 4, 13, 9, {5, 1, 0, 1}, {5, 1, 4, 2}), last);
    check<T>(make_conv(2, 3, 13, 12, {2, 1, 0, 3}, {7, 3, 5, 2}), last);
    check<T>(make_conv(2, 3, 5, 6, {3, 1, 2, 2}, {3, 4, 0, 1}), last);
    check<T>(make_conv(2, 3, 4, 5, {1, 3, 2, 1}, {4, 1, 3, 1}), last);
    // Several parts for each weight.
    check<T>(make_conv(7, 2, 37, 36, {3, 1, 1, 1}, {3, 1, 1, 1}), last);
    // Nothing to add.
    check<T>(make_conv(0, 3, 5, 5, {3, 1, 1, 1}, {3, 1, 1, 1}), last);
    check<T>(make_conv(2, 0, 5, 5, {3, 1, 1, 1}, {3, 1, 1, 1}), last);
    check<T>(make_conv(2, 3, 0, 5, {3, 1, 2, 1}, {3, 1, 1, 1}), last);
  }
}

// Past 2^33 elements, where no tensor needs to exist.
void check_addresses() {
  for (const bool last : {false, true}) {
    const ImageBatch batch{3000, 96, 191, 197, last};
    static_assert(int64_t{3000} * 96 * 191 * 197 > int64_t{1} << 33);
    for (const auto& [image, c, y, x] : {std::array<int64_t, 4>{2999, 95, 190, 196}, {2998, 0, 190, 1}, {0, 7, 0, 5}}) {
      const int64_t wanted = element(batch, image, c, y, x);
      CHECK(batch.plane(image, c) + y * batch.row_stride() + x * batch.column_stride() == wanted);
      const auto place = place_of(batch, static_cast<uint32_t>(wanted - image * batch.image_size()));
      CHECK(place.channel == c && place.y == y && place.x == x);
    }
    // The last element of the largest image there may be.
    const ImageBatch image{1, 1, (int64_t{1} << 31) - 1, 1, last};
    CHECK(place_of(image, 0x7ffffffe).y == 0x7ffffffe);
  }
}

}  // namespace

int main() {
  check_shapes<float>();
  check_shapes<double>();
  check_shapes<stamp_fast::BFloat16>();
  check_shapes<stamp_fast::Float16>();
  check_addresses();
}
