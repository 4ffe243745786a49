// The kernel of masm::fold. Kept apart from its launcher so that the same source also runs on a CPU under the
// emulation of tests/cuda_emulation.
#pragma once
#include <cstdint>

#include "device.cuh"

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

}  // namespace masm::cuda
