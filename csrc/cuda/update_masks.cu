#include "launch.h"
#include "update_masks.cuh"

namespace masm::cuda {

cudaError_t update_masks(const MaskTable& table, const MaskPolicy& policy, cudaStream_t stream) {
  update_masks_kernel<<<1, kMaskThreads, 0, stream>>>(table, policy);
  return cudaGetLastError();
}

}  // namespace masm::cuda
