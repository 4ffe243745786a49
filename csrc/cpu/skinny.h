// The skinny products of the low-rank path: the long side is L (D or N), the short one R. Each CPU gets the kernels of
// its best instruction set: skinny_kernels.cpp is compiled once for each, and chosen at run time.
#pragma once
#include <cstdint>

namespace masm::cpu {

// bfloat16 as it lies in memory. Kernels of its own exist only where the CPU multiplies bfloat16 (AVX512_BF16).
struct BF16 {
  uint16_t bits;
};

// Kernels on rows of S (float, double or BF16) with sums and coefficients in A (float; double for double). All matrices
// are contiguous. `packed` is made by the function of the same name and holds a [R, L] matrix in the kernels' order.
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

// The best that this CPU can run; the environment variable MASM_CPU_ISA (baseline, x86_64_v3, x86_64_v4, avx512_bf16)
// asks for another one, for tests. Throws if that one is unknown or the CPU lacks it.
const Kernels& kernels();

}  // namespace masm::cpu
