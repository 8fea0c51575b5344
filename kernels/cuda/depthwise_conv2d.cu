#include <algorithm>
#include <type_traits>

#include "kernels/cuda/block.h"
#include "kernels/cuda/depthwise_conv2d.h"
#include "kernels/dtype.h"

namespace stamp_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kElementsPerBlock = 2048;
// Positions that a block adds up for one weight.
constexpr uint32_t kPositionsPerBlock = 8192;
// Positions that one thread adds up at a time for one weight, and threads enough to fill a large GPU.
constexpr int64_t kPositionsPerThread = 64;
constexpr int64_t kWantedThreads = 1 << 20;

struct ForwardParams {
  DepthwiseConv conv;
  const void* input;
  const void* weight;
  void* output;
};

struct InputGradParams {
  DepthwiseConv conv;
  const void* grad;
  const void* weight;
  void* input_grad;
};

struct WeightGradParams {
  DepthwiseConv conv;
  const void* grad = nullptr;
  const void* input = nullptr;
  void* weight_grad = nullptr;
  // The positions of all images are cut into `parts` of `step`.
  int64_t parts = 0;
  int64_t step = 0;
  void* sums = nullptr;  // (weights, parts) accumulators

  SF_HOST_DEVICE int64_t taps() const { return static_cast<int64_t>(conv.y.size) * conv.x.size; }
  SF_HOST_DEVICE int64_t weights() const { return conv.input.channels * taps(); }
};

// kSize is the filter's height and width where they are known at compile time, else 0.
template <typename T, int kSize>
__global__ void forward_kernel(const __grid_constant__ ForwardParams params) {
  const ImageBatch& from = params.conv.input;
  const ImageBatch& to = params.conv.output;
  const Window wy = params.conv.y, wx = params.conv.x;
  const int filter_height = kSize > 0 ? kSize : wy.size;
  const int filter_width = kSize > 0 ? kSize : wx.size;
  for_elements(blockIdx.x, kElementsPerBlock, to.images, to.image_size(), [&](int64_t image, uint32_t offset) {
    const Place place = place_of(to, offset);
    const T* plane = static_cast<const T*>(params.input) + from.plane(image, place.channel);
    const T* weight =
        static_cast<const T*>(params.weight) + static_cast<int64_t>(place.channel) * filter_height * filter_width;
    const int top = static_cast<int>(place.y) * wy.stride - wy.padding;
    const int left = static_cast<int>(place.x) * wx.stride - wx.padding;
    accumulator_t<T> sum = 0;
    for (int j = 0; j < filter_height; ++j) {
      const int y = top + j * wy.dilation;
      if (y < 0 || y >= from.height) continue;
      const T* row = plane + y * from.row_stride();
      for (int i = 0; i < filter_width; ++i) {
        const int x = left + i * wx.dilation;
        if (x < 0 || x >= from.width) continue;
        sum += widen(row[x * from.column_stride()]) * widen(weight[j * filter_width + i]);
      }
    }
    static_cast<T*>(params.output)[image * to.image_size() + offset] = narrow<T>(sum);
  });
}

// The output position that reads input position `at` through the filter's element `tap`, or -1.
template <bool kUnitStride>
__device__ int output_position(const Window& window, int64_t outputs, int at, int tap) {
  int position = at + window.padding - tap * window.dilation;
  if (!kUnitStride) {
    if (position < 0 || position % window.stride != 0) return -1;
    position /= window.stride;
  }
  return position < outputs ? position : -1;
}

template <typename T, int kSize, bool kUnitStride>
__global__ void input_grad_kernel(const __grid_constant__ InputGradParams params) {
  const ImageBatch& from = params.conv.output;
  const ImageBatch& to = params.conv.input;
  const Window wy = params.conv.y, wx = params.conv.x;
  const int filter_height = kSize > 0 ? kSize : wy.size;
  const int filter_width = kSize > 0 ? kSize : wx.size;
  for_elements(blockIdx.x, kElementsPerBlock, to.images, to.image_size(), [&](int64_t image, uint32_t offset) {
    const Place place = place_of(to, offset);
    const T* plane = static_cast<const T*>(params.grad) + from.plane(image, place.channel);
    const T* weight =
        static_cast<const T*>(params.weight) + static_cast<int64_t>(place.channel) * filter_height * filter_width;
    accumulator_t<T> sum = 0;
    for (int j = 0; j < filter_height; ++j) {
      const int y = output_position<kUnitStride>(wy, from.height, static_cast<int>(place.y), j);
      if (y < 0) continue;
      const T* row = plane + y * from.row_stride();
      for (int i = 0; i < filter_width; ++i) {
        const int x = output_position<kUnitStride>(wx, from.width, static_cast<int>(place.x), i);
        if (x < 0) continue;
        sum += widen(row[x * from.column_stride()]) * widen(weight[j * filter_width + i]);
      }
    }
    static_cast<T*>(params.input_grad)[image * to.image_size() + offset] = narrow<T>(sum);
  });
}

// grad * input for one output position and one weight; 0 where the filter's element falls on padding.
template <typename T>
__device__ accumulator_t<T> product(const WeightGradParams& params, int64_t image, uint32_t position, int64_t channel,
                                    int tap_y, int tap_x) {
  const ImageBatch& input = params.conv.input;
  const ImageBatch& output = params.conv.output;
  const auto width = static_cast<uint32_t>(output.width);
  const auto oy = static_cast<int>(position / width), ox = static_cast<int>(position % width);
  const int y = oy * params.conv.y.stride - params.conv.y.padding + tap_y * params.conv.y.dilation;
  const int x = ox * params.conv.x.stride - params.conv.x.padding + tap_x * params.conv.x.dilation;
  if (y < 0 || y >= input.height || x < 0 || x >= input.width) return 0;
  const int64_t from = input.plane(image, channel) + y * input.row_stride() + x * input.column_stride();
  const int64_t at = output.plane(image, channel) + position * output.column_stride();
  return widen(static_cast<const T*>(params.grad)[at]) * widen(static_cast<const T*>(params.input)[from]);
}

// A block for each weight and part: the positions of a plane lie side by side.
template <typename T>
__global__ void weight_sums_kernel(const __grid_constant__ WeightGradParams params) {
  const ImageBatch& output = params.conv.output;
  const int64_t part = blockIdx.x % params.parts;
  const int64_t weight = blockIdx.x / params.parts;
  const int64_t channel = weight / params.taps();
  const auto tap = static_cast<int>(weight % params.taps());
  const int tap_y = tap / params.conv.x.size, tap_x = tap % params.conv.x.size;
  PerThread<accumulator_t<T>> sums;
  each_thread([&](unsigned thread) { sums[thread] = 0; });
  for_elements(part, kPositionsPerBlock, output.images, output.height * output.width,
               [&](int64_t image, uint32_t position) {
                 sums[threadIdx.x] += product<T>(params, image, position, channel, tap_y, tap_x);
               });
  const auto total = block_sum(sums);
  one_thread([&] { static_cast<accumulator_t<T>*>(params.sums)[blockIdx.x] = total; });
}

// A thread for each weight and part: neighbouring threads read neighbouring channels.
template <typename T>
__global__ void weight_sums_last_kernel(const __grid_constant__ WeightGradParams params) {
  const ImageBatch& output = params.conv.output;
  const int64_t plane = output.height * output.width;
  const int64_t positions = output.images * plane;
  each_thread([&](unsigned thread) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + thread;
    if (row >= params.weights() * params.parts) return;
    const int64_t channel = row % output.channels;
    const auto tap = static_cast<int>(row / output.channels % params.taps());
    const int tap_y = tap / params.conv.x.size, tap_x = tap % params.conv.x.size;
    const int64_t part = row / output.channels / params.taps();
    int64_t begin = part * params.step;
    const int64_t end = begin + params.step < positions ? begin + params.step : positions;
    accumulator_t<T> total = 0;
    int64_t image = begin / plane;
    auto position = static_cast<uint32_t>(begin % plane);
    while (begin < end) {
      const int64_t stop = begin + kPositionsPerThread < end ? begin + kPositionsPerThread : end;
      accumulator_t<T> run = 0;
      for (; begin < stop; ++begin) {
        run += product<T>(params, image, position, channel, tap_y, tap_x);
        if (++position == plane) {
          position = 0;
          ++image;
        }
      }
      total += run;
    }
    static_cast<accumulator_t<T>*>(params.sums)[(channel * params.taps() + tap) * params.parts + part] = total;
  });
}

// A block for each weight: adds up its parts.
template <typename T>
__global__ void weight_grad_kernel(const __grid_constant__ WeightGradParams params) {
  const auto* from = static_cast<const accumulator_t<T>*>(params.sums) + blockIdx.x * params.parts;
  PerThread<accumulator_t<T>> sums;
  each_thread([&](unsigned thread) {
    sums[thread] = 0;
    for (int64_t part = thread; part < params.parts; part += blockDim.x) sums[thread] += from[part];
  });
  const auto total = block_sum(sums);
  one_thread([&] { static_cast<T*>(params.weight_grad)[blockIdx.x] = narrow<T>(total); });
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

int threads_for(int64_t elements) { return elements < 4 * kThreads ? static_cast<int>(kWarp) : kThreads; }

int64_t blocks_for(const ImageBatch& batch) {
  return ceil_divide(batch.images * batch.image_size(), kElementsPerBlock);
}

WeightGradParams make_params(const DepthwiseConv& conv) {
  WeightGradParams params{.conv = conv};
  const int64_t positions = conv.output.images * conv.output.height * conv.output.width;
  params.step = conv.output.channels_last
                    ? std::max(kPositionsPerThread, ceil_divide(positions * params.weights(), kWantedThreads))
                    : kPositionsPerBlock;
  params.parts = ceil_divide(positions, params.step);
  return params;
}

// Calls function(std::integral_constant of the filter's size), 0 for a size without a kernel of its own.
template <typename Function>
auto with_size(const DepthwiseConv& conv, const Function& function) {
  if (conv.y.size == 3 && conv.x.size == 3) return function(std::integral_constant<int, 3>{});
  if (conv.y.size == 5 && conv.x.size == 5) return function(std::integral_constant<int, 5>{});
  return function(std::integral_constant<int, 0>{});
}

}  // namespace

cudaError_t depthwise_conv2d(const DepthwiseConv& conv, const void* input, const void* weight, void* output,
                             cudaStream_t stream) {
  const ForwardParams params{conv, input, weight, output};
  cudaError_t status = cudaSuccess;
  with_type(conv.dtype, [&]<typename T>(T) {
    status = with_size(conv, [&](auto size) {
      return launch(forward_kernel<T, size()>, blocks_for(conv.output), kThreads, stream, params);
    });
  });
  return status;
}

cudaError_t depthwise_conv2d_backward_input(const DepthwiseConv& conv, const void* grad, const void* weight,
                                            void* input_grad, cudaStream_t stream) {
  const InputGradParams params{conv, grad, weight, input_grad};
  const bool unit_stride = conv.y.stride == 1 && conv.x.stride == 1;
  cudaError_t status = cudaSuccess;
  with_type(conv.dtype, [&]<typename T>(T) {
    status = with_size(conv, [&](auto size) {
      const auto kernel = unit_stride ? input_grad_kernel<T, size(), true> : input_grad_kernel<T, size(), false>;
      return launch(kernel, blocks_for(conv.input), kThreads, stream, params);
    });
  });
  return status;
}

int64_t depthwise_conv2d_backward_weight_scratch(const DepthwiseConv& conv) {
  const WeightGradParams params = make_params(conv);
  return params.weights() * params.parts * accumulator_size(conv.dtype);
}

cudaError_t depthwise_conv2d_backward_weight(const DepthwiseConv& conv, const void* grad, const void* input,
                                             void* scratch, void* weight_grad, cudaStream_t stream) {
  WeightGradParams params = make_params(conv);
  params.grad = grad;
  params.input = input;
  params.sums = scratch;
  params.weight_grad = weight_grad;
  cudaError_t status = cudaSuccess;
  with_type(conv.dtype, [&]<typename T>(T) {
    const int64_t rows = params.weights() * params.parts;
    status = conv.output.channels_last
                 ? launch(weight_sums_last_kernel<T>, ceil_divide(rows, kThreads), kThreads, stream, params)
                 : launch(weight_sums_kernel<T>, rows, kThreads, stream, params);
    if (status != cudaSuccess) return;
    status = launch(weight_grad_kernel<T>, params.weights(), threads_for(params.parts), stream, params);
  });
  return status;
}

}  // namespace stamp_fast::cuda
