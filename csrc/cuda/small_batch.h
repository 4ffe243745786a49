// The operands of the forward pass of up to 64 rows (stream_linear.cuh). Needs neither torch nor CUDA.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace masm::cuda {

constexpr int kSmallRows = 64;  // most rows
constexpr int kSmallRank = 64;  // most directions

// y [M, N] = x weight^T + ((x v^T) * s) u + bias and p [M, R] = x v^T. x [M, D], weight [N, D], bias [N] or null and y
// have dtype `type` (f16 or bf16), u [R, N], s [R] and v [R, D] `factor_type`, which is `type` or f32. Contiguous but
// for the rows of x and weight; those, and v's, start at multiples of 16 bytes. x_row, weight_row: elements from row to
// row.
struct StreamCall {
  int64_t M, N, D, R;
  const void *x, *weight, *u, *s, *v, *bias;
  void* y;
  float* p;
  int64_t x_row, weight_row;
  DType type, factor_type;
};

}  // namespace masm::cuda
