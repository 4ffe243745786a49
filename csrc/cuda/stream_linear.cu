#include "launch.h"
#include "stream_linear.cuh"

namespace masm::cuda {

cudaError_t stream_linear(const StreamCall& call, cudaStream_t stream) {
  int device = 0, processors = 1;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  start_stream(call, processors, kSharedFactor, [&](auto kernel, unsigned blocks, int threads, const auto& arguments) {
    if (status != cudaSuccess) return;
    kernel<<<blocks, threads, 0, stream>>>(arguments);
    status = cudaGetLastError();
  });
  return status;
}

}  // namespace masm::cuda
