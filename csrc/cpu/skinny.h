// The skinny products of the low-rank path, four rows at a time, on contiguous rows of float or double.
// Compiled once per instruction set and chosen at run time (GCC/Clang function multiversioning), so that a wheel built
// anywhere uses AVX2 or AVX-512 where the CPU has it. Rows past the end of a matrix are passed as pointers to zeros.
#pragma once
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define MASM_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MASM_SIMD
#endif

namespace masm::cpu {

constexpr int kRows = 4;

// out[i * R + r] = sum_d x[i][d] * v[r, d]
void skinny_dot(const float* const* x, const float* v, int64_t R, int64_t D, float* out);
void skinny_dot(const double* const* x, const double* v, int64_t R, int64_t D, double* out);

// y[i][n] += sum_r c[i * R + r] * u[r, n]
void skinny_add(float* const* y, const float* c, const float* u, int64_t R, int64_t N);
void skinny_add(double* const* y, const double* c, const double* u, int64_t R, int64_t N);

// out[r, n] += sum_i c[i * R + r] * y[i][n] for r in [begin, end)
void skinny_outer(float* out, const float* c, const float* const* y, int64_t begin, int64_t end, int64_t R, int64_t N);
void skinny_outer(double* out, const double* c, const double* const* y, int64_t begin, int64_t end, int64_t R,
                  int64_t N);

// bfloat16 <-> float, round to nearest even, on raw bits.
void widen_bf16(const uint16_t* in, float* out, int64_t n);
void narrow_bf16(const float* in, uint16_t* out, int64_t n);

}  // namespace masm::cpu
