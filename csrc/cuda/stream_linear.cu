#include "launch.h"
#include "stream_linear.cuh"

namespace masm::cuda {

cudaError_t stream_linear(const StreamCall& call, cudaStream_t stream) {
  int device = 0, processors = 1;
  cudaFuncAttributes built{};
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  // As all kernels of this file were: on a GPU that runs code made for sm_80 nobody would wait (stream_linear.cuh).
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&built, stream_linear_kernel<__half, float, 16, 1>);
  if (status != cudaSuccess) return status;
  const bool overlaps = built.ptxVersion >= 90;
  auto launch = [&](auto kernel, dim3 grid, int threads, const auto& arguments, bool early) {
    if (status != cudaSuccess) return;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.stream = stream;
    config.attrs = &attribute, config.numAttrs = early && overlaps;
    status = cudaLaunchKernelEx(&config, kernel, arguments);
  };
  start_stream(call, {processors, overlaps ? kSharedFactor : kSharedFactorAlone}, launch);
  return status;
}

}  // namespace masm::cuda
