// What the forward pass of a few rows reads and writes (stream_linear.cuh). Knows neither torch nor CUDA.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace masm::cuda {

constexpr int kSmallRows = 64;   // most rows
constexpr int kSmallLayers = 4;  // most layers of a call
constexpr int kSmallRank = 64;   // most directions of a layer

struct SmallSizes {
  int64_t layers, M, N, D, R;
};

// One layer: weight [N, D], u [R, N], s [R], v [R, D], bias [N] or null, y [M, N]. Contiguous but for the rows of the
// weight; those of weight, v and x start at multiples of 16 bytes.
struct SmallLayer {
  const void *weight, *u, *s, *v, *bias;
  void* y;
};

// y = x weight^T + ((x v^T) * s) u + bias of each layer, and P = x v^T to columns of p [M, layers R]. x [M, D], weight,
// bias and y have dtype `type` (f16 or bf16), u, s and v `factor_type`, which is `type` or f32.
// x_row, weight_row, p_row: elements from row to row.
struct StreamCall {
  SmallLayer layer[kSmallLayers];
  SmallSizes sizes;
  const void* x;
  float* p;
  int64_t x_row, weight_row, p_row;
  DType type, factor_type;
};

}  // namespace masm::cuda
