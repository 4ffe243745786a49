// The kernels of skinny.h for one instruction set: the build compiles this file once for each, and MASM_ISA names the
// result. It includes nothing that other files instantiate too (no <algorithm>, no <vector>): the linker could keep the
// copy compiled for a newer CPU.
//
// All three products are register tiles of one shape: `tile rows` scalars are broadcast against NV vectors, one step of
// the contraction at a time. A step is one element, or a pair of bfloat16 (one 32-bit word; vdpbf16ps).
#include <cstdint>

#include "skinny.h"
#if !defined(__F16C__)
#include <torch/headeronly/util/Half.h>
#endif

#include "skinny_add.h"
#include "skinny_dot.h"
#include "skinny_outer.h"
#include "skinny_vectors.h"

namespace masm::cpu {
namespace {

template <class S>
int64_t packed_size(int64_t R, int64_t L) {
  const int64_t for_dot = round_up(R, dot_vectors<S>(R) * kWidth<S>) * steps<S>(L);
  const int64_t for_add = steps<S>(R) * round_up(L, kAddWidth<S>);
  return for_dot > for_add ? for_dot : for_add;
}

template <class S>
int64_t scratch_size(int64_t rows, int64_t R) {
  const int64_t for_add = rows * 2 * steps<S>(R);
  const int64_t for_outer = steps<S>(rows) * (R + kOuterWidth<S>)+R * kOuterWidth<S>;
  return for_add > for_outer ? for_add : for_outer;
}

void widen_bf16(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(in[i]);
}
void narrow_bf16(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(in[i]);
}

#if defined(__F16C__)
void widen_fp16(const uint16_t* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < n; ++i) out[i] = _cvtsh_ss(in[i]);
}
void narrow_fp16(const float* in, uint16_t* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) out[i] = _cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT);
}
#else
void widen_fp16(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = float(c10::Half(in[i], c10::Half::from_bits()));
}
void narrow_fp16(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = c10::Half(in[i]).x;
}
#endif

template <class S>
constexpr Skinny<S, Acc<S>> skinny() {
  return {packed_size<S>, scratch_size<S>, pack_dot<S>, pack_add<S>, dot<S>, add<S>, outer<S>};
}

#if defined(__AVX512BF16__)
constexpr Skinny<BF16, float> kBF16 = skinny<BF16>();
constexpr const Skinny<BF16, float>* kBF16Pointer = &kBF16;
#else
constexpr const Skinny<BF16, float>* kBF16Pointer = nullptr;
#endif

}  // namespace

#define MASM_STRING(x) #x
#define MASM_NAME(x) MASM_STRING(x)
extern const Kernels MASM_ISA;
// constinit: no code of this file may run before the CPU is known to have its instructions.
constinit const Kernels MASM_ISA = {MASM_NAME(MASM_ISA),
                                    skinny<float>(),
                                    skinny<double>(),
                                    kBF16Pointer,
                                    {widen_bf16, narrow_bf16, widen_fp16, narrow_fp16}};

}  // namespace masm::cpu
