#include "fold.cuh"

#include "dtype.h"
#include "entry.h"

using namespace masm::cuda;

namespace {
template <class T, class F, class A>
void run(void* out, const void* weight, const void* u, const void* s, const void* v, int64_t N, int64_t D, int64_t R,
         int64_t seed) {
  // a grid smaller than N rows exercises the stride over rows
  const dim3 grid(unsigned((D + 31) / 32), unsigned(std::min<int64_t>(N, 3)));
  emulation::launch(unsigned(seed), fold_kernel<T, F, A>, grid, 32, 0, static_cast<T*>(out),
                    static_cast<const T*>(weight), static_cast<const F*>(u), static_cast<const F*>(s),
                    static_cast<const F*>(v), N, D, R);
}
}  // namespace

// type: of weight and out; `wide`: u, s and v are float32 beside half precision.
extern "C" const char* fold(void* out, const void* weight, const void* u, const void* s, const void* v, int64_t N,
                            int64_t D, int64_t R, int64_t type, int64_t wide, int64_t seed) {
  return guarded([&] {
    switch (DType(type)) {
      case DType::f32:
        return run<float, float, float>(out, weight, u, s, v, N, D, R, seed);
      case DType::f64:
        return run<double, double, double>(out, weight, u, s, v, N, D, R, seed);
      case DType::f16:
        return wide ? run<half_t, float, float>(out, weight, u, s, v, N, D, R, seed)
                    : run<half_t, half_t, float>(out, weight, u, s, v, N, D, R, seed);
      default:
        return wide ? run<bf16_t, float, float>(out, weight, u, s, v, N, D, R, seed)
                    : run<bf16_t, bf16_t, float>(out, weight, u, s, v, N, D, R, seed);
    }
  });
}
