#include "skinny.h"

#include <cstring>

namespace masm::cpu {

// One body for both types: target_clones does not apply to templates.
#define MASM_SKINNY(F)                                                                                      \
  MASM_SIMD void skinny_dot(const F* const* x, const F* v, int64_t R, int64_t D, F* out) {                  \
    const F *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];                                                 \
    for (int64_t r = 0; r < R; ++r) {                                                                       \
      const F* vr = v + r * D;                                                                              \
      F a0 = 0, a1 = 0, a2 = 0, a3 = 0;                                                                     \
      _Pragma("omp simd reduction(+ : a0, a1, a2, a3)") for (int64_t d = 0; d < D; ++d) {                   \
        a0 += x0[d] * vr[d];                                                                                \
        a1 += x1[d] * vr[d];                                                                                \
        a2 += x2[d] * vr[d];                                                                                \
        a3 += x3[d] * vr[d];                                                                                \
      }                                                                                                     \
      out[r] = a0, out[R + r] = a1, out[2 * R + r] = a2, out[3 * R + r] = a3;                               \
    }                                                                                                       \
  }                                                                                                         \
  MASM_SIMD void skinny_add(F* const* y, const F* c, const F* u, int64_t R, int64_t N) {                    \
    for (int i = 0; i < kRows; ++i) {                                                                       \
      F* yi = y[i];                                                                                         \
      const F* ci = c + i * R;                                                                              \
      int64_t r = 0;                                                                                        \
      for (; r + 4 <= R; r += 4) {                                                                          \
        const F c0 = ci[r], c1 = ci[r + 1], c2 = ci[r + 2], c3 = ci[r + 3];                                 \
        const F *u0 = u + r * N, *u1 = u0 + N, *u2 = u1 + N, *u3 = u2 + N;                                  \
        _Pragma("omp simd") for (int64_t n = 0; n < N; ++n) yi[n] +=                                        \
            (c0 * u0[n] + c1 * u1[n]) + (c2 * u2[n] + c3 * u3[n]);                                          \
      }                                                                                                     \
      for (; r < R; ++r) {                                                                                  \
        const F c0 = ci[r];                                                                                 \
        const F* u0 = u + r * N;                                                                            \
        _Pragma("omp simd") for (int64_t n = 0; n < N; ++n) yi[n] += c0 * u0[n];                            \
      }                                                                                                     \
    }                                                                                                       \
  }                                                                                                         \
  MASM_SIMD void skinny_outer(F* out, const F* c, const F* const* y, int64_t begin, int64_t end, int64_t R, \
                              int64_t N) {                                                                  \
    const F *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];                                                 \
    for (int64_t r = begin; r < end; ++r) {                                                                 \
      const F c0 = c[r], c1 = c[R + r], c2 = c[2 * R + r], c3 = c[3 * R + r];                               \
      F* o = out + r * N;                                                                                   \
      _Pragma("omp simd") for (int64_t n = 0; n < N; ++n) o[n] +=                                           \
          (c0 * y0[n] + c1 * y1[n]) + (c2 * y2[n] + c3 * y3[n]);                                            \
    }                                                                                                       \
  }

MASM_SKINNY(float)
MASM_SKINNY(double)

MASM_SIMD void widen_bf16(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = uint32_t(in[i]) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

MASM_SIMD void narrow_bf16(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, in + i, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out[i] = uint16_t(nan ? 0x7fc0u : rounded);
  }
}

}  // namespace masm::cpu
