// The skinny products of the low-rank path: the long side is L (D or N), the short one R. skinny_kernels.cpp is
// compiled once per instruction set; the best one that the CPU has is selected at run time.
#pragma once
#include <cstdint>

namespace masm::cpu {

// bfloat16 as stored in memory. It has kernels only on CPUs that multiply bfloat16 (AVX512_BF16).
struct BF16 {
  uint16_t bits;
};

// Kernels on rows of S (float, double or BF16) with sums and coefficients in A (float; double for double). All matrices
// are contiguous. pack_dot and pack_add write `packed`, a [R, L] matrix in the order of the kernel.
template <class S, class A>
struct Skinny {
  // Elements (of A) that a packed [R, L] matrix needs, for dot and for add; scratch elements for blocks of `rows` rows.
  int64_t (*packed_size)(int64_t R, int64_t L);
  int64_t (*scratch_size)(int64_t rows, int64_t R);
  void (*pack_dot)(const A* b, int64_t R, int64_t L, A* packed);
  void (*pack_add)(const A* b, int64_t R, int64_t L, A* packed);

  // out [rows, R] = x [rows, L] b^T
  void (*dot)(const S* x, int64_t rows, int64_t L, const A* packed, int64_t R, A* out);
  // y [rows, L] = (accumulate ? y : 0) + c [rows, R] b + bias [L] (or null), rounded once. BF16: c is rounded to
  // bfloat16, or, with `fine`, to the sum of two bfloat16 (16 bits).
  void (*add)(const A* c, int64_t rows, int64_t R, const A* packed, int64_t L, const A* bias, bool accumulate,
              bool fine, S* y, A* scratch);
  // o [R, L] += c [rows, R]^T y [rows, L]. BF16: c is rounded to bfloat16.
  void (*outer)(const A* c, int64_t rows, int64_t R, const S* y, int64_t L, A* o, A* scratch);
};

// Half precision to and from float, n elements, round to nearest even.
struct Convert {
  void (*widen_bf16)(const uint16_t* in, float* out, int64_t n);
  void (*narrow_bf16)(const float* in, uint16_t* out, int64_t n);
  void (*widen_fp16)(const uint16_t* in, float* out, int64_t n);
  void (*narrow_fp16)(const float* in, uint16_t* out, int64_t n);
};

struct Kernels {
  const char* name;  // the instruction set they were compiled for
  Skinny<float, float> f32;
  Skinny<double, double> f64;
  const Skinny<BF16, float>* bf16;  // null: rows are widened to float first
  Convert convert;
};

// The best kernels that this CPU can run. For tests, the environment variable MASM_CPU_ISA selects others (baseline,
// x86_64_v3, x86_64_v4, avx512_bf16). Throws if the name is unknown or the CPU lacks the instructions.
const Kernels& kernels();

}  // namespace masm::cpu
