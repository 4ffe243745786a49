// du = (P * s)^T dY, dv = (Q * s)^T x, ds = sum_m P * Q and dbias = sum_m dY of a few rows, in one launch.
//
// du with dbias, and dv with ds, are the same thing: sums over m of T[m, r] Z[m, w]. A block owns 16 directions r and
// 64 bytes of the columns w; its 8 warps split the rows m. Lane l holds 16 bytes of Z, those of number l % 4, and
// directions l / 4 and l / 4 + 8. A value of T is used by four lanes of one warp, so it goes to registers, not through
// shared memory.
#pragma once
#include <algorithm>

#include "device.cuh"
#include "small_batch.h"

namespace masm::cuda {

constexpr int kGradientThreads = 256, kGradientWarps = kGradientThreads / 32;
constexpr int kGradientTile = 16;  // directions of a block
constexpr int kGradientRows = 4;   // rows whose loads a thread has in flight

template <class T>
struct GradientLayer {
  const T* dy;          // [M, N]
  const uint8_t* mask;  // [K] or null
};

template <class T, class F>
struct SmallGradients {
  GradientLayer<T> layer[kSmallLayers];
  const T* x;          // [M, D]
  const float *p, *q;  // [M, layers R]
  const F* s;          // [layers R]
  F *du, *dv, *ds;     // [layers R, N], [layers R, D], [layers R]; null: not needed
  T* dbias;            // [layers N] or null
  int64_t dy_row, x_row, p_row, q_row;
  int M, N, D, R;
  int du_blocks;                    // blocks before this one are for du and dbias, those from it on for dv and ds
  int32_t subspace[kGradientRank];  // of each direction of a layer, where there is a mask
};

// Columns of a block.
template <class T>
constexpr int kGradientColumns = 64 / int(sizeof(T));

// blockIdx: x the columns, of dY and then of x; y the layer; z the directions.
template <class T, class F, bool ALIGNED>
__global__ void __launch_bounds__(kGradientThreads, 2)
    small_gradients_kernel(const __grid_constant__ SmallGradients<T, F> call) {
  constexpr int E = 16 / sizeof(T), W = 4 * E;
  static_assert(W == kGradientColumns<T>);
  MASM_SHARED(float, parts, kGradientWarps * kGradientTile * W);
  MASM_SHARED(float, extra, kGradientWarps* W);  // parts of dbias, or of ds
  MASM_SHARED(int, live, kGradientTile);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const int R = call.R, r0 = blockIdx.z * kGradientTile, layer = blockIdx.y;
  const bool is_du = int(blockIdx.x) < call.du_blocks;
  const int tile = is_du ? blockIdx.x : blockIdx.x - call.du_blocks, w0 = tile * W;
  const int width = is_du ? call.N : call.D;
  F* const out = is_du ? call.du : call.dv;
  const bool sums_z = is_du && call.dbias != nullptr && blockIdx.z == 0;
  const bool sums_pq = !is_du && call.ds != nullptr && tile == 0;

  // Which directions of this block are live?
  const uint8_t* const mask = call.layer[layer].mask;
  int mine = 0;
  if (threadIdx.x < kGradientTile) {
    const int r = r0 + threadIdx.x;
    mine = r < R && (mask == nullptr || mask[call.subspace[r]] != 0);
    live[threadIdx.x] = mine;
  }
  const bool any = __syncthreads_or(mine);

  const bool products = any && out != nullptr;
  float sums[2][E] = {}, total[E] = {}, pq[2] = {};
  if (products || sums_z || (any && sums_pq)) {
    const T* const z = is_du ? call.layer[layer].dy : call.x;
    const float* const t = (is_du ? call.p : call.q) + int64_t(layer) * R;
    const int64_t z_row = is_du ? call.dy_row : call.x_row, t_row = is_du ? call.p_row : call.q_row;
    const int w = w0 + lane % 4 * E;
    const bool reads_z = products || sums_z;
    for (int first = warp; first < call.M; first += kGradientWarps * kGradientRows) {
      Pack<T> piece[kGradientRows];
      float factor[kGradientRows][2], p[kGradientRows][2];
#pragma unroll
      for (int i = 0; i < kGradientRows; ++i) {
        const int m = first + i * kGradientWarps;
        for (int e = 0; e < E; ++e) piece[i].at[e] = T(0.f);
        if (reads_z && m < call.M) {
          if constexpr (ALIGNED) {
            if (w < width) piece[i] = load<E>(z + m * z_row + w);
          } else {
            for (int e = 0; e < E; ++e)
              if (w + e < width) piece[i].at[e] = z[m * z_row + w + e];
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int r = r0 + g + 8 * j;
          const bool there = any && r < R && m < call.M;
          factor[i][j] = there && (products || sums_pq) ? t[m * t_row + r] : 0.f;
          p[i][j] = there && sums_pq ? call.p[m * call.p_row + int64_t(layer) * R + r] : 0.f;
        }
      }
#pragma unroll
      for (int i = 0; i < kGradientRows; ++i) {
#pragma unroll
        for (int e = 0; e < E; ++e) {
          const float value = float(piece[i].at[e]);
          sums[0][e] += factor[i][0] * value;
          sums[1][e] += factor[i][1] * value;
          total[e] += value;
        }
        for (int j = 0; j < 2; ++j) pq[j] += factor[i][j] * p[i][j];
      }
    }
  }

  if (products) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < E; ++e) parts[(warp * kGradientTile + g + 8 * j) * W + lane % 4 * E + e] = sums[j][e];
  }
  if (sums_z && g == 0)
    for (int e = 0; e < E; ++e) extra[warp * W + lane * E + e] = total[e];
  if (sums_pq && lane % 4 == 0)
    for (int j = 0; j < 2; ++j) extra[warp * W + g + 8 * j] = pq[j];
  __syncthreads();

  if (out != nullptr)
    for (int i = threadIdx.x; i < kGradientTile * W; i += kGradientThreads) {
      const int r = i / W, w = w0 + i % W;
      if (r0 + r >= R || w >= width) continue;
      const int64_t row = int64_t(layer) * R + r0 + r;
      float sum = 0;
      if (products && live[r]) {
        for (int part = 0; part < kGradientWarps; ++part) sum += parts[part * kGradientTile * W + i];
        sum *= float(call.s[row]);
      }
      out[row * width + w] = F(sum);
    }
  if (sums_z && int(threadIdx.x) < W && w0 + int(threadIdx.x) < width) {
    float sum = 0;
    for (int part = 0; part < kGradientWarps; ++part) sum += extra[part * W + threadIdx.x];
    call.dbias[int64_t(layer) * width + w0 + threadIdx.x] = T(sum);
  }
  if (sums_pq && int(threadIdx.x) < kGradientTile && r0 + int(threadIdx.x) < R) {
    float sum = 0;
    if (live[threadIdx.x])
      for (int part = 0; part < kGradientWarps; ++part) sum += extra[part * W + threadIdx.x];
    call.ds[int64_t(layer) * R + r0 + threadIdx.x] = F(sum);
  }
}

// On the host. launch(kernel, grid, threads, arguments) starts a kernel.
template <class T, class F, class Launch>
void start_small_gradients(const SmallGradientsCall& from, Launch launch) {
  const auto [layers, M, N, D, R] = from.sizes;
  const bool of_dy = from.du != nullptr || from.dbias != nullptr, of_x = from.dv != nullptr || from.ds != nullptr;
  SmallGradients<T, F> call{};
  bool is_aligned = true;
  auto check = [&](const void* z, int64_t row, int64_t width) {
    constexpr int64_t E = 16 / sizeof(T);
    is_aligned &= reinterpret_cast<uintptr_t>(z) % 16 == 0 && row % E == 0 && width % E == 0;
  };
  for (int64_t j = 0; j < layers; ++j) {
    call.layer[j] = {static_cast<const T*>(from.dy[j]), static_cast<const uint8_t*>(from.mask[j])};
    if (of_dy) check(from.dy[j], from.dy_row, N);
  }
  if (from.dv != nullptr) check(from.x, from.x_row, D);
  call.x = static_cast<const T*>(from.x), call.p = from.p, call.q = from.q, call.s = static_cast<const F*>(from.s);
  call.du = static_cast<F*>(from.du), call.dv = static_cast<F*>(from.dv), call.ds = static_cast<F*>(from.ds);
  call.dbias = static_cast<T*>(from.dbias);
  call.dy_row = from.dy_row, call.x_row = from.x_row, call.p_row = from.p_row, call.q_row = from.q_row;
  call.M = int(M), call.N = int(N), call.D = int(D), call.R = int(R);
  std::copy_n(from.subspace, kGradientRank, call.subspace);

  auto tiles = [](int64_t width) { return int((width + kGradientColumns<T> - 1) / kGradientColumns<T>); };
  call.du_blocks = of_dy ? tiles(N) : 0;
  const int dv_blocks = from.dv != nullptr ? std::max(1, tiles(D)) : of_x;  // ds needs one
  const int64_t directions = from.du != nullptr || of_x ? (R + kGradientTile - 1) / kGradientTile : 0;
  const dim3 grid(unsigned(call.du_blocks + dv_blocks), unsigned(layers), unsigned(std::max<int64_t>(1, directions)));
  if (grid.x == 0) return;
  if (is_aligned)
    launch(small_gradients_kernel<T, F, true>, grid, kGradientThreads, call);
  else
    launch(small_gradients_kernel<T, F, false>, grid, kGradientThreads, call);
}

template <class Launch>
void start_small_gradients(const SmallGradientsCall& call, Launch launch) {
  const bool wide = call.factor_type == DType::f32;
  if (call.type == DType::f32)
    start_small_gradients<float, float>(call, launch);
  else if (call.type == DType::f16)
    wide ? start_small_gradients<__half, float>(call, launch) : start_small_gradients<__half, __half>(call, launch);
  else
    wide ? start_small_gradients<__nv_bfloat16, float>(call, launch)
         : start_small_gradients<__nv_bfloat16, __nv_bfloat16>(call, launch);
}

}  // namespace masm::cuda
