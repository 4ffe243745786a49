// Torch-free interface of the CUDA kernels: raw pointers, sizes, a stream. Includes only the CUDA runtime's header.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace masm::cuda {

enum class DType : int32_t { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// out [N, D] = weight + u^T diag(s) v. weight and out have dtype `weight_type`; u [R, N], s [R], v [R, D]
// `factor_type`, which is weight_type, or f32 beside a half-precision weight. All contiguous.
cudaError_t fold(void* out, const void* weight, const void* u, const void* s, const void* v, int64_t N, int64_t D,
                 int64_t R, DType weight_type, DType factor_type, cudaStream_t stream);

}  // namespace masm::cuda
