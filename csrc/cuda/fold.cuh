// The kernel of masm::fold. Kept apart from its launcher so that the same source also runs on a CPU under the
// emulation of tests/cuda_emulation.
#pragma once
#include <cstdint>

#include "device.cuh"
#include "dtype.h"

namespace masm::cuda {

// One thread one element of the row; blockIdx.y strides over rows. The factors of a row are shared by the whole block:
// c[r] = s[r] u[r, n] is read through the cache. A is float, or double for double.
template <class T, class F, class A>
__global__ void fold_kernel(T* __restrict__ out, const T* __restrict__ weight, const F* __restrict__ u,
                            const F* __restrict__ s, const F* __restrict__ v, int64_t N, int64_t D, int64_t R) {
  const int64_t d = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (d >= D) return;
  for (int64_t n = blockIdx.y; n < N; n += gridDim.y) {
    A sum = A(weight[n * D + d]);
    for (int64_t r = 0; r < R; ++r) sum += A(s[r]) * A(u[r * N + n]) * A(v[r * D + d]);
    out[n * D + d] = T(sum);
  }
}

// On the host: run(kernel, zero of T, zero of F) with the kernel for these types, and what it returns.
template <class Run>
auto with_fold_kernel(DType weight_type, DType factor_type, Run run) {
  const bool wide = factor_type == DType::f32;
  switch (weight_type) {
    case DType::f32:
      return run(fold_kernel<float, float, float>, float(), float());
    case DType::f64:
      return run(fold_kernel<double, double, double>, double(), double());
    case DType::f16:
      return wide ? run(fold_kernel<half_t, float, float>, half_t(0.0f), float())
                  : run(fold_kernel<half_t, half_t, float>, half_t(0.0f), half_t(0.0f));
    default:
      return wide ? run(fold_kernel<bf16_t, float, float>, bf16_t(0.0f), float())
                  : run(fold_kernel<bf16_t, bf16_t, float>, bf16_t(0.0f), bf16_t(0.0f));
  }
}

}  // namespace masm::cuda
