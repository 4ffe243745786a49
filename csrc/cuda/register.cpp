// CUDA registration through the stable ABI. Plain C++ (no nvcc): checks, then calls the torch-free launchers.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "launch.h"

// Declared here so that -DUSE_CUDA, which only gates this prototype, is not needed.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace masm {
namespace {

cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

cuda::DType dtype_of(const Tensor& t) {
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

Tensor fold(const Tensor& weight, const Tensor& u, const Tensor& s, const Tensor& v) {
  check_factors("fold", weight, u, s, v);
  torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const Tensor w = torch::stable::contiguous(weight), uc = torch::stable::contiguous(u),
               sc = torch::stable::contiguous(s), vc = torch::stable::contiguous(v);
  Tensor out = torch::stable::new_empty(w, {w.size(0), w.size(1)});
  const cudaError_t status =
      cuda::fold(out.mutable_data_ptr(), w.const_data_ptr(), uc.const_data_ptr(), sc.const_data_ptr(),
                 vc.const_data_ptr(), w.size(0), w.size(1), sc.size(0), dtype_of(w), dtype_of(uc), stream_of(w));
  STD_TORCH_CHECK(status == cudaSuccess, "masm::fold: ", cudaGetErrorString(status));
  return out;
}

}  // namespace
}  // namespace masm

STABLE_TORCH_LIBRARY_IMPL(masm, CUDA, m) { m.impl("fold", TORCH_BOX(&masm::fold)); }
