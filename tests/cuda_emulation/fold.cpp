#include "fold.cuh"

#include "entry.h"

using namespace masm::cuda;

extern "C" const char* fold(void* out, const void* weight, const void* u, const void* s, const void* v, int64_t N,
                            int64_t D, int64_t R, int64_t type, int64_t factor_type, int64_t seed) {
  return guarded([&] {
    // a grid smaller than N rows exercises the stride over rows
    const dim3 grid(unsigned((D + 31) / 32), unsigned(std::min<int64_t>(N, 3)));
    with_fold_kernel(DType(type), DType(factor_type), [&](auto kernel, auto t, auto f) {
      using T = decltype(t);
      using F = decltype(f);
      emulation::launch(unsigned(seed), kernel, grid, 32, 0, static_cast<T*>(out), static_cast<const T*>(weight),
                        static_cast<const F*>(u), static_cast<const F*>(s), static_cast<const F*>(v), N, D, R);
    });
  });
}
