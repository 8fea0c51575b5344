#include <algorithm>

#include "kernels/cuda/block.h"
#include "kernels/cuda/channel_saliency.h"
#include "kernels/dtype.h"

namespace stamp_fast::cuda {
namespace {

constexpr int kThreads = 256;
// Threads and small blocks enough to fill a large GPU; they take the rest in turns.
constexpr int64_t kWantedThreads = 1 << 18;
constexpr int64_t kMaxBlocks = 1 << 14;
// Fewer positions than this are left to one thread.
constexpr int64_t kMinShared = 16;

// Elements that one thread adds up in accumulator_t; everything longer is summed in double.
constexpr int64_t kRun = 32;

// The positions of each (image, channel) are cut into `parts` of `step`. A count of up to 2^24 is exact in float.
struct Params {
  SaliencyInput input;
  int64_t parts;
  int64_t step;
  double* sums;  // (3, channels, images, parts): of activation * gradient, of activation, of its zeros
  void* result;

  SF_HOST_DEVICE int64_t rows() const { return input.images * input.channels * parts; }
  SF_HOST_DEVICE int64_t end(int64_t part) const {
    const int64_t positions = input.positions();
    return (part + 1) * step < positions ? (part + 1) * step : positions;
  }
};

template <typename T>
struct Sums {
  accumulator_t<T> product = 0;
  accumulator_t<T> value = 0;
  accumulator_t<T> zeros = 0;

  __device__ void add(const SaliencyInput& input, int64_t at) {
    const accumulator_t<T> a = widen(static_cast<const T*>(input.activation)[at]);
    product += a * widen(static_cast<const T*>(input.gradient)[at]);
    value += a;
    zeros += a == 0 ? 1 : 0;
  }
};

template <typename T>
__device__ void store(const Params& params, int64_t image, int64_t channel, int64_t part, const Sums<T>& sums) {
  const int64_t images = params.input.images;
  const int64_t plane = params.input.channels * images * params.parts;
  double* to = params.sums + (channel * images + image) * params.parts + part;
  to[0] = sums.product;
  to[plane] = sums.value;
  to[2 * plane] = sums.zeros;
}

// A block for each part: its elements lie side by side.
template <typename T>
__global__ void shared_kernel(const __grid_constant__ Params params) {
  const SaliencyInput& input = params.input;
  for (int64_t row = blockIdx.x; row < params.rows(); row += gridDim.x) {
    const int64_t part = row % params.parts;
    const int64_t channel = row / params.parts % input.channels;
    const int64_t image = row / params.parts / input.channels;
    PerThread<accumulator_t<T>> product, value, zeros;
    each_thread([&](unsigned thread) {
      Sums<T> sums;
      const int64_t end = params.end(part);
      for (int64_t p = part * params.step + thread; p < end; p += blockDim.x) {
        sums.add(input, input.offset(image, channel, p));
      }
      product[thread] = sums.product;
      value[thread] = sums.value;
      zeros[thread] = sums.zeros;
    });
    const Sums<T> sums{block_sum(product), block_sum(value), block_sum(zeros)};
    one_thread([&] { store(params, image, channel, part, sums); });
  }
}

// A thread for each part, neighbouring threads on neighbouring channels.
template <typename T>
__global__ void lone_kernel(const __grid_constant__ Params params) {
  const SaliencyInput& input = params.input;
  each_thread([&](unsigned thread) {
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + thread; row < params.rows(); row += threads) {
      const int64_t channel = row % input.channels;
      const int64_t part = row / input.channels % params.parts;
      const int64_t image = row / input.channels / params.parts;
      Sums<double> sums;
      const int64_t end = params.end(part);
      for (int64_t begin = part * params.step; begin < end; begin += kRun) {
        Sums<T> run;
        const int64_t stop = begin + kRun < end ? begin + kRun : end;
        for (int64_t p = begin; p < stop; ++p) run.add(input, input.offset(image, channel, p));
        sums.product += run.product;
        sums.value += run.value;
        sums.zeros += run.zeros;
      }
      store(params, image, channel, part, sums);
    }
  });
}

// A block for each channel: adds up its images and their parts.
template <typename T>
__global__ void finish_kernel(const __grid_constant__ Params params) {
  const SaliencyInput& input = params.input;
  for (int64_t channel = blockIdx.x; channel < input.channels; channel += gridDim.x) {
    const int64_t plane = input.channels * input.images * params.parts;
    PerThread<double> taylor, fisher, value, zeros;
    each_thread([&](unsigned thread) {
      taylor[thread] = fisher[thread] = value[thread] = zeros[thread] = 0;
      for (int64_t image = thread; image < input.images; image += blockDim.x) {
        const double* from = params.sums + (channel * input.images + image) * params.parts;
        double product = 0;
        for (int64_t part = 0; part < params.parts; ++part) {
          product += from[part];
          value[thread] += from[plane + part];
          zeros[thread] += from[2 * plane + part];
        }
        taylor[thread] += product < 0 ? -product : product;
        fisher[thread] += product * product;
      }
    });
    const double sums[] = {block_sum(taylor), block_sum(fisher), block_sum(value), block_sum(zeros)};
    one_thread([&] {
      // The mean of nothing is 0.
      const int64_t elements = input.images * input.positions();
      const double count = elements > 0 ? static_cast<double>(elements) : 1;
      const double divisors[] = {1, 2, count, count};
      for (int row = 0; row < 4; ++row) {
        static_cast<accumulator_t<T>*>(params.result)[row * input.channels + channel] =
            static_cast<accumulator_t<T>>(sums[row] / divisors[row]);
      }
    });
  }
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

int threads_for(int64_t elements) { return elements < 4 * kThreads ? static_cast<int>(kWarp) : kThreads; }

// Whether a thread has a part of its own.
bool is_lone(const SaliencyInput& input) { return input.inner == 1 || input.positions() < kMinShared; }

Params make_params(const SaliencyInput& input) {
  int64_t step = kRun * kThreads;
  if (is_lone(input)) {
    const int64_t elements = input.images * input.positions() * input.channels;
    step = std::clamp<int64_t>(elements / kWantedThreads, 2 * kRun, 8 * kRun);
  }
  return {.input = input,
          .parts = std::max<int64_t>(ceil_divide(input.positions(), step), 1),
          .step = step,
          .sums = nullptr,
          .result = nullptr};
}

}  // namespace

int64_t channel_saliency_scratch(const SaliencyInput& input) {
  return 3 * make_params(input).rows() * static_cast<int64_t>(sizeof(double));
}

cudaError_t channel_saliency(const SaliencyInput& input, void* scratch, void* result, cudaStream_t stream) {
  Params params = make_params(input);
  params.sums = static_cast<double*>(scratch);
  params.result = result;
  cudaError_t status = cudaSuccess;
  with_type(input.dtype, [&]<typename T>(T) {
    if (is_lone(input)) {
      const int64_t blocks = std::min(ceil_divide(params.rows(), kThreads), kWantedThreads / kThreads);
      status = launch(lone_kernel<T>, blocks, kThreads, stream, params);
    } else {
      const int threads = threads_for(std::min(params.step, input.positions()));
      status = launch(shared_kernel<T>, std::min(params.rows(), kMaxBlocks), threads, stream, params);
    }
    if (status != cudaSuccess) return;
    const int64_t blocks = std::min(input.channels, kMaxBlocks);
    status = launch(finish_kernel<T>, blocks, threads_for(input.images * params.parts), stream, params);
  });
  return status;
}

}  // namespace stamp_fast::cuda
