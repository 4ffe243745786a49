#include "launch.h"
#include "stream_linear.cuh"

namespace masm::cuda {

cudaError_t stream_linear(const StreamCall& call, cudaStream_t stream) {
  int device = 0, processors = 1, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  auto launch = [&](auto kernel, dim3 grid, int threads, const auto& arguments, bool early) {
    if (status != cudaSuccess) return;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.stream = stream;
    config.attrs = &attribute, config.numAttrs = early && major >= 9;
    status = cudaLaunchKernelEx(&config, kernel, arguments);
  };
  start_stream(call, {processors, major >= 9}, launch);
  return status;
}

}  // namespace masm::cuda
