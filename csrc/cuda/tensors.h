// Reads what the torch-free launchers need from a tensor.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include "../contract.h"
#include "dtype.h"

// Declared here so that -DUSE_CUDA, which only gates this prototype, is not needed.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace masm {

inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline cuda::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return cuda::DType::f64;
    case ScalarType::Half:
      return cuda::DType::f16;
    case ScalarType::BFloat16:
      return cuda::DType::bf16;
    default:
      return cuda::DType::f32;
  }
}

}  // namespace masm
