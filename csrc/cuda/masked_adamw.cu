// Launches the kernels of masked_adamw.cuh: the number of resident blocks, the upload of parameters, the step.
#include <algorithm>
#include <cstring>

#include "launch.h"
#include "masked_adamw.cuh"

namespace masm::cuda {
namespace {

AdamWList list_of(const AdamWParameter* parameters, int64_t count) {
  AdamWList list;
  std::memcpy(list.at, parameters, count * sizeof(AdamWParameter));
  return list;
}

}  // namespace

cudaError_t masked_adamw_blocks(const AdamWTables& tables, int32_t* blocks) {
  int device = 0, processors = 0, resident = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, masked_adamw_kernel, kAdamWThreads, 0);
  if (status == cudaSuccess && resident * processors == 0) status = cudaErrorCooperativeLaunchTooLarge;
  if (status != cudaSuccess) return status;
  *blocks = int32_t(std::clamp<int64_t>(std::max(tables.S, tables.B), 1, int64_t(resident) * processors));
  return cudaSuccess;
}

cudaError_t masked_adamw(const AdamWParameter* parameters, const AdamWTables& tables, AdamWParameter* uploaded,
                         int32_t blocks, cudaStream_t stream) {
  if (uploaded != nullptr)
    for (int64_t t = 0; t < tables.T; t += kAdamWInline) {
      const int64_t count = std::min<int64_t>(kAdamWInline, tables.T - t);
      upload_parameters_kernel<<<1, kAdamWThreads, 0, stream>>>(list_of(parameters + t, count), uploaded + t,
                                                                int(count));
      const cudaError_t status = cudaGetLastError();
      if (status != cudaSuccess) return status;
    }
  AdamWTables a = tables;
  AdamWList list = list_of(parameters, uploaded == nullptr ? tables.T : 0);
  void* arguments[] = {&a, &list, &uploaded};
  const cudaError_t status = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(masked_adamw_kernel),
                                                         dim3(blocks), dim3(kAdamWThreads), arguments, 0, stream);
  if (status != cudaSuccess) cudaGetLastError();  // cleared: a later launch must not report it
  return status;
}

}  // namespace masm::cuda
