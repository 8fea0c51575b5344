// How the threads of a block share work, in phases: each_thread runs a phase for every thread, block_sum joins what
// the threads hold. Between phases a kernel keeps per-thread values in PerThread. Sums have one fixed order, which is
// the same on the host.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/cuda/launch.h"

#if defined(SF_EMULATE_CUDA) || defined(__CUDACC__)

namespace stamp_fast::cuda {

inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kMaxThreads = 256;

#ifndef SF_EMULATE_CUDA

// One T of each thread: a register.
template <typename T>
class PerThread {
 public:
  __device__ T& operator[](unsigned) { return value_; }

 private:
  T value_;
};

// Calls function(thread) for every thread of the block.
template <typename Function>
__device__ void each_thread(const Function& function) {
  function(threadIdx.x);
}

// The sum over the threads of the block, for all of them. Every thread of the block must come here.
template <typename T>
__device__ T block_sum(PerThread<T>& values) {
  __shared__ T warp_sums[kMaxThreads / kWarp];
  T value = values[threadIdx.x];
  for (unsigned step = kWarp / 2; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  // A slower warp may still be reading what the sum before this one left.
  __syncthreads();
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = warp_sums[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) total += warp_sums[warp];
  return total;
}

#else  // SF_EMULATE_CUDA

template <typename T>
class PerThread {
 public:
  // What a kernel forgets to set must show.
  PerThread() {
    for (T& value : values_) value = std::numeric_limits<T>::quiet_NaN();
  }
  T& operator[](unsigned thread) { return values_[thread]; }

 private:
  T values_[kMaxThreads];
};

template <typename Function>
void each_thread(const Function& function) {
  for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) function(threadIdx.x);
}

template <typename T>
T block_sum(const PerThread<T>& values) {
  if (blockDim.x % kWarp != 0 || blockDim.x > kMaxThreads) std::abort();
  PerThread<T> sums = values;
  T total = 0;
  for (unsigned first = 0; first < blockDim.x; first += kWarp) {
    for (unsigned step = kWarp / 2; step > 0; step /= 2) {
      for (unsigned lane = 0; lane < step; ++lane) sums[first + lane] += sums[first + lane + step];
    }
    total = first == 0 ? sums[0] : total + sums[first];
  }
  return total;
}

#endif

// Calls function() on one thread.
template <typename Function>
__device__ void one_thread(const Function& function) {
  each_thread([&](unsigned thread) {
    if (thread == 0) function();
  });
}

// Calls function(row, offset in the row) for the elements of chunk `chunk` of a (rows, row_size) array that is cut
// into chunks of `chunk_size`, neighbouring threads side by side. Only the chunk's start needs 64-bit division:
// row_size < 2^31, chunk_size <= 2^20.
template <typename Function>
__device__ void for_elements(int64_t chunk, uint32_t chunk_size, int64_t rows, int64_t row_size,
                             const Function& function) {
  const int64_t start = chunk * chunk_size;
  const int64_t first_row = start / row_size;
  const auto first = static_cast<uint32_t>(start - first_row * row_size);
  const auto size = static_cast<uint32_t>(row_size);
  each_thread([&](unsigned thread) {
    for (uint32_t t = thread; t < chunk_size; t += blockDim.x) {
      const int64_t row = first_row + (first + t) / size;
      if (row >= rows) return;
      function(row, (first + t) % size);
    }
  });
}

}  // namespace stamp_fast::cuda

#endif
