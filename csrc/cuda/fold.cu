#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "fold.cuh"
#include "launch.h"

namespace masm::cuda {
namespace {

template <class T, class F, class A>
cudaError_t launch(void* out, const void* weight, const void* u, const void* s, const void* v, int64_t N, int64_t D,
                   int64_t R, cudaStream_t stream) {
  if (N == 0 || D == 0) return cudaSuccess;
  constexpr int kThreads = 256;
  const dim3 grid(unsigned((D + kThreads - 1) / kThreads), unsigned(std::min<int64_t>(N, 65535)));
  fold_kernel<T, F, A><<<grid, kThreads, 0, stream>>>(static_cast<T*>(out), static_cast<const T*>(weight),
                                                      static_cast<const F*>(u), static_cast<const F*>(s),
                                                      static_cast<const F*>(v), N, D, R);
  return cudaGetLastError();
}

}  // namespace

cudaError_t fold(void* out, const void* weight, const void* u, const void* s, const void* v, int64_t N, int64_t D,
                 int64_t R, DType weight_type, DType factor_type, cudaStream_t stream) {
  const bool wide = factor_type == DType::f32;
  switch (weight_type) {
    case DType::f32:
      return launch<float, float, float>(out, weight, u, s, v, N, D, R, stream);
    case DType::f64:
      return launch<double, double, double>(out, weight, u, s, v, N, D, R, stream);
    case DType::f16:
      return wide ? launch<__half, float, float>(out, weight, u, s, v, N, D, R, stream)
                  : launch<__half, __half, float>(out, weight, u, s, v, N, D, R, stream);
    case DType::bf16:
      return wide ? launch<__nv_bfloat16, float, float>(out, weight, u, s, v, N, D, R, stream)
                  : launch<__nv_bfloat16, __nv_bfloat16, float>(out, weight, u, s, v, N, D, R, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace masm::cuda
