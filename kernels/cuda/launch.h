// What the kernels need of CUDA. Under SF_EMULATE_CUDA the same names run a kernel on the host, block after block, so
// that its logic is tested where there is no GPU. There the kernel is called once per block: what differs from thread
// to thread stands inside the loops of kernels/cuda/block.h, and the rest is the same for every thread of a block.
#pragma once

#include <cstdint>
#include <limits>

#ifndef SF_EMULATE_CUDA

#include <cuda_runtime.h>

#ifdef __CUDACC__

#define SF_TRAP() __trap()

namespace stamp_fast::cuda {

// `threads` is a multiple of 32.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), int64_t blocks, int threads, cudaStream_t stream, const Params& params) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace stamp_fast::cuda

#endif  // __CUDACC__

#else  // SF_EMULATE_CUDA

#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __grid_constant__
#define SF_TRAP() std::abort()

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };

struct EmulatedIndex {
  unsigned x;
};
inline EmulatedIndex blockIdx, threadIdx, blockDim, gridDim;

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

namespace stamp_fast::cuda {

template <typename Params>
cudaError_t launch(void (*kernel)(Params), int64_t blocks, int threads, cudaStream_t, const Params& params) {
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) kernel(params);
  return cudaSuccess;
}

}  // namespace stamp_fast::cuda

#endif
