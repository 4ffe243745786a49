#include "launch.h"
#include "small_gradients.cuh"

namespace masm::cuda {

cudaError_t small_gradients(const SmallGradientsCall& call, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  start_small_gradients(call, [&](auto kernel, dim3 grid, int threads, const auto& arguments) {
    kernel<<<grid, threads, 0, stream>>>(arguments);
    status = cudaGetLastError();
  });
  return status;
}

}  // namespace masm::cuda
