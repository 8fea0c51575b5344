// What the kernels need of CUDA. Under SF_EMULATE_CUDA the same names run a kernel on the host, block after
// block and thread after thread, so that its logic is tested where there is no GPU. That suffices for kernels
// whose threads do not wait for one another.
#pragma once

#include <cstdint>

#ifndef SF_EMULATE_CUDA

#include <cuda_runtime.h>

#ifdef __CUDACC__

#define SF_TRAP() __trap()

namespace stamp_fast::cuda {

template <typename Params>
cudaError_t launch(void (*kernel)(Params), int64_t blocks, int threads, cudaStream_t stream, const Params& params) {
  if (blocks == 0) return cudaSuccess;
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
inline EmulatedIndex blockIdx, threadIdx, blockDim;

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

namespace stamp_fast::cuda {

template <typename Params>
cudaError_t launch(void (*kernel)(Params), int64_t blocks, int threads, cudaStream_t, const Params& params) {
  blockDim.x = static_cast<unsigned>(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(params);
  }
  return cudaSuccess;
}

}  // namespace stamp_fast::cuda

#endif
