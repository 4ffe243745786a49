#include <algorithm>

#include "fold.cuh"
#include "launch.h"

namespace masm::cuda {

cudaError_t fold(void* out, const void* weight, const void* u, const void* s, const void* v, int64_t N, int64_t D,
                 int64_t R, DType weight_type, DType factor_type, cudaStream_t stream) {
  if (N == 0 || D == 0) return cudaSuccess;
  constexpr int kThreads = 256;
  const dim3 grid(unsigned((D + kThreads - 1) / kThreads), unsigned(std::min<int64_t>(N, 65535)));
  return with_fold_kernel(weight_type, factor_type, [&](auto kernel, auto t, auto f) {
    using T = decltype(t);
    using F = decltype(f);
    kernel<<<grid, kThreads, 0, stream>>>(static_cast<T*>(out), static_cast<const T*>(weight), static_cast<const F*>(u),
                                          static_cast<const F*>(s), static_cast<const F*>(v), N, D, R);
    return cudaGetLastError();
  });
}

}  // namespace masm::cuda
