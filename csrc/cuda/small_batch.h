// What calls of a few rows read and write (stream_linear.cuh, small_gradients.cuh). Knows neither torch nor CUDA.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace masm::cuda {

constexpr int kSmallRows = 64;      // most rows
constexpr int kSmallLayers = 4;     // most layers of a call
constexpr int kSmallRank = 64;      // most directions of a layer whose y is asked for
constexpr int kGradientRank = 256;  // most directions of a layer whose gradients are

struct SmallSizes {
  int64_t layers, M, N, D, R;
};

// One layer: x [M, D], weight [N, D], u [R, N], s [R], v [R, D], bias [N] or null, y [M, N]. Contiguous but for the
// rows of x and weight.
struct SmallLayer {
  const void *x, *weight, *u, *s, *v, *bias;
  void* y;
};

// y = x weight^T + ((x v^T) * s) u + bias of each layer, and P = x v^T to columns of p [M, layers R]. x, weight, bias
// and y have dtype `type` (not f64), u, s and v `factor_type`, which is `type`, or f32 beside half precision. x_row,
// weight_row, p_row: elements from row to row.
struct StreamCall {
  SmallLayer layer[kSmallLayers];
  SmallSizes sizes;
  bool only_p;  // reads x and v of each layer; R may be anything
  float* p;
  int64_t x_row, weight_row, p_row;
  DType type, factor_type;
};

// du [layers R, N] = s (P^T dY), dv [layers R, D] = s (Q^T x), ds [layers R] = sum_m P * Q and dbias [layers N] = sum_m
// dY; what is null is not needed. dy [M, N] of each layer, x [M, D], p and q [M, layers R], s [layers R]. mask: bytes,
// one a subspace, or null; subspace: of each direction of a layer.
struct SmallGradientsCall {
  const void* dy[kSmallLayers];
  const void* mask[kSmallLayers];
  SmallSizes sizes;
  const void *x, *s;
  const float *p, *q;
  void *du, *dv, *ds, *dbias;
  int64_t dy_row, x_row, p_row, q_row;
  int32_t subspace[kGradientRank];
  DType type, factor_type;
};

}  // namespace masm::cuda
