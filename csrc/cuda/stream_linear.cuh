// y = x weight^T + ((x v^T) * s) u + bias for at most 64 rows of half-precision x: the weight streams through the
// registers once. Rows of x, weight and v start at multiples of 16 bytes.
//
// A block of 8 warps, which split the D columns, takes a few tiles of 8 rows of the weight. The rows of v are tiles
// like those of the weight: a block computes P = x v^T itself, or an earlier launch does. The sums of the warps are
// added in shared memory, in order. Lane l holds 16 bytes of row l / 4 of each tile: number l % 4 of 64 bytes a row.
#pragma once
#include <type_traits>

#include "mma.cuh"
#include "small_batch.h"

namespace masm::cuda {

// Bytes of v up to which every block reads it: a larger v costs more than a launch. Modelled, not measured.
constexpr int64_t kSharedFactor = 128 << 10;
constexpr int kStreamThreads = 256, kStreamWarps = kStreamThreads / 32;

template <class T, class F>
struct Stream {
  const T *x, *weight;  // [M, D], [N, D]
  const F *u, *s, *v;   // [R, N], [R], [R, D]
  const T* bias;        // [N] or null
  T* y;                 // [M, N]
  float* p;             // [M, R]
  int64_t x_row, weight_row;
  int M, N, D, R;
  int tiles;     // tiles of the weight that a block takes; 0: P alone, and blockIdx.x is the tile of v
  bool reads_p;  // the launch before this one writes p
};

// A thread's sums of a tile [ROWS, 8], in the layout of mma_m16n8k16, 16 rows at a time.
template <int ROWS>
struct StreamSums {
  static_assert(ROWS % 16 == 0);
  float at[ROWS / 16][4];
};

// 8 elements from column k of a row of F, as T; zeros unless `there`.
template <class T, class F>
__device__ inline Pack<T> stream_piece(const F* row, int k, bool there) {
  constexpr int E = 16 / sizeof(T);
  Pack<F, E> wide;
  for (int i = 0; i < E; ++i) wide.at[i] = F(0.f);
  if (there) wide = load<E>(row + k);
  if constexpr (std::is_same_v<T, F>) {
    return wide;
  } else {
    Pack<T> out;
    for (int i = 0; i < E; ++i) out.at[i] = T(float(wide.at[i]));
    return out;
  }
}

// The elements of x in one block of columns.
template <class T, int ROWS>
struct StreamRows {
  Pack<T> at[ROWS / 16][2];

  __device__ void read(const T* x, int64_t x_row, int rows, int k, bool there) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int tile = 0; tile < ROWS / 16; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = 16 * tile + 8 * half + g;
        at[tile][half] = stream_piece<T>(x + m * x_row, k, there && m < rows);
      }
  }

  // sums[t] += x tiles[t]^T for the first `count` tiles. The 8 columns of a lane are two words for each of two
  // products: the order of a sum is free as long as both operands have the same.
  template <int TILES>
  __device__ void multiply(StreamSums<ROWS> (&sums)[TILES], const Pack<T> (&tiles)[TILES], int count, int rows) const {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      if (t >= count) break;
      uint32_t b[4];
      memcpy(b, &tiles[t], 16);
#pragma unroll
      for (int m = 0; m < ROWS / 16; ++m) {
        if (16 * m >= rows) break;
        uint32_t top[4], bottom[4];
        memcpy(top, &at[m][0], 16);
        memcpy(bottom, &at[m][1], 16);
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          mma_m16n8k16<T>(sums[t].at[m], {top[i], bottom[i], top[i + 1], bottom[i + 1]}, {b[i], b[i + 1]});
      }
    }
  }
};

template <int ROWS>
__device__ inline void stream_put(float* part, const StreamSums<ROWS>& sums) {  // part [ROWS, 8]: of this warp
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < ROWS / 16; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) part[(16 * m + g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums.at[m][i];
}

// ROWS: capacity for rows of x. WT: tiles of the weight at a time.
template <class T, class F, int ROWS, int WT>
__global__ void __launch_bounds__(kStreamThreads, 1) stream_linear_kernel(const __grid_constant__ Stream<T, F> call) {
  constexpr int E = 16 / sizeof(T), K = 4 * E;  // columns of a lane and of a warp
  constexpr int VT = 2;                         // tiles of v at a time
  // Blocks of columns whose loads are in flight together: as many as the sums leave registers for.
  constexpr int U = (WT == 1 ? 2 : 1) * (ROWS <= 32 ? 2 : 1);
  constexpr int kColumns = 8 * WT, kPRow = kSmallRank + 1;  // + 1: rows of P start in different banks

  MASM_SHARED(float, parts, kStreamWarps * ROWS * 8);
  MASM_SHARED(float, p, ROWS* kPRow);
  MASM_SHARED(float, su, kSmallRank* kColumns);
  MASM_SHARED(float, bias, kColumns);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  const int rows = call.M, N = call.N, D = call.D, R = call.R;
  const bool alone = call.tiles == 0;
  const bool writes_p = alone || (blockIdx.x == 0 && !call.reads_p);

  int v_tile = alone ? blockIdx.x : 0;
  const int v_end = alone ? v_tile + 1 : call.reads_p ? 0 : (R + 7) / 8;
  const int first_tile = blockIdx.x * call.tiles;
  int w_tile = first_tile;
  const int w_after = w_tile + call.tiles, w_end = w_after < (N + 7) / 8 ? w_after : (N + 7) / 8;
  do {
    // The last tiles of v go with the first of the weight: P is complete when the first y is written.
    const int vs = v_end - v_tile < VT ? v_end - v_tile : VT;
    const int left = v_tile + vs == v_end ? w_end - w_tile : 0, ws = left < 0 ? 0 : left < WT ? left : WT;

    // Early loads of what the end of this pass needs.
    float ahead[2 * WT], ahead_bias = 0;
#pragma unroll
    for (int i = 0; i < 2 * WT; ++i) {
      const int at = threadIdx.x + i * kStreamThreads, r = at / kColumns, n = 8 * w_tile + at % kColumns;
      ahead[i] = 0;
      if (ws > 0 && r < R && n < N) ahead[i] = float(call.s[r]) * float(call.u[int64_t(r) * N + n]);
    }
    if (ws > 0 && call.bias != nullptr && threadIdx.x < kColumns && int(8 * w_tile + threadIdx.x) < N)
      ahead_bias = float(call.bias[8 * w_tile + threadIdx.x]);

    StreamSums<ROWS> w_sums[WT] = {}, v_sums[VT] = {};
    for (int first = warp * K; first < D; first += kStreamWarps * K * U) {
      Pack<T> w[U][WT], v[U][VT];
      StreamRows<T, ROWS> part[U];
#pragma unroll
      for (int i = 0; i < U; ++i) {
        const int k = first + i * kStreamWarps * K + lane % 4 * E;
#pragma unroll
        for (int t = 0; t < WT; ++t) {
          const int n = 8 * (w_tile + t) + g;
          w[i][t] = stream_piece<T>(call.weight + n * call.weight_row, k, k < D && t < ws && n < N);
        }
#pragma unroll
        for (int t = 0; t < VT; ++t) {
          const int r = 8 * (v_tile + t) + g;
          v[i][t] = stream_piece<T>(call.v + int64_t(r) * D, k, k < D && t < vs && r < R);
        }
        part[i].read(call.x, call.x_row, rows, k, k < D);
      }
#pragma unroll
      for (int i = 0; i < U; ++i) {
        if (first + i * kStreamWarps * K >= D) break;
        part[i].multiply(v_sums, v[i], vs, rows);
        part[i].multiply(w_sums, w[i], ws, rows);
      }
    }

#pragma unroll
    for (int i = 0; i < 2 * WT; ++i) su[threadIdx.x + i * kStreamThreads] = ahead[i];
    if (threadIdx.x < kColumns) bias[threadIdx.x] = ahead_bias;
    if (call.reads_p && w_tile == first_tile) {
      for (int i = threadIdx.x; i < rows * R; i += kStreamThreads) p[i / R * kPRow + i % R] = call.p[i];
    }

#pragma unroll
    for (int t = 0; t < VT; ++t) {
      if (t >= vs) break;
      stream_put(parts + warp * ROWS * 8, v_sums[t]);
      __syncthreads();
      for (int i = threadIdx.x; i < rows * 8; i += kStreamThreads) {
        const int m = i / 8, r = 8 * (v_tile + t) + i % 8;
        float sum = 0;
        for (int part = 0; part < kStreamWarps; ++part) sum += parts[part * ROWS * 8 + i];
        if (r >= R) continue;
        if (!alone) p[m * kPRow + r] = sum;
        if (writes_p) call.p[m * R + r] = sum;
      }
      __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < WT; ++t) {
      if (t >= ws) break;
      stream_put(parts + warp * ROWS * 8, w_sums[t]);
      __syncthreads();
      for (int i = threadIdx.x; i < rows * 8; i += kStreamThreads) {
        const int m = i / 8, column = 8 * t + i % 8, n = 8 * w_tile + column;
        if (n >= N) continue;
        float sum = 0, low = 0;
        for (int part = 0; part < kStreamWarps; ++part) sum += parts[part * ROWS * 8 + i];
        for (int r = 0; r < R; ++r) low += p[m * kPRow + r] * su[r * kColumns + column];
        call.y[int64_t(m) * N + n] = T(sum + low + bias[column]);
      }
      __syncthreads();
    }
    v_tile += vs, w_tile += ws;
  } while (v_tile < v_end || w_tile < w_end);
}

// The rest runs on the host. launch(kernel, blocks, threads, arguments) starts a kernel.
template <class T, class F, int ROWS, class Launch>
void start_stream(const Stream<T, F>& call, int64_t blocks, Launch launch) {
  if (call.tiles <= 1)
    launch(stream_linear_kernel<T, F, ROWS, 1>, unsigned(blocks), kStreamThreads, call);
  else
    launch(stream_linear_kernel<T, F, ROWS, 4>, unsigned(blocks), kStreamThreads, call);
}

template <class T, class F, class Launch>
void start_stream(const StreamCall& from, int64_t processors, int64_t shared_factor, Launch launch) {
  const int64_t M = from.M, N = from.N, D = from.D, R = from.R;
  if (M == 0 || (R == 0 && N == 0)) return;
  Stream<T, F> call{};
  call.x = static_cast<const T*>(from.x), call.weight = static_cast<const T*>(from.weight);
  call.u = static_cast<const F*>(from.u), call.s = static_cast<const F*>(from.s);
  call.v = static_cast<const F*>(from.v);
  call.bias = static_cast<const T*>(from.bias), call.y = static_cast<T*>(from.y), call.p = from.p;
  call.x_row = from.x_row, call.weight_row = from.weight_row;
  call.M = int(M), call.N = int(N), call.D = int(D), call.R = int(R);
  constexpr int kFew = 16;
  auto start = [&](int64_t blocks) {
    if (M <= kFew)
      start_stream<T, F, kFew>(call, blocks, launch);
    else
      start_stream<T, F, kSmallRows>(call, blocks, launch);
  };
  // P in a launch of its own, ahead, if reading v in every block takes longer than a launch.
  call.reads_p = N == 0 || (R > 0 && R * D * int64_t(sizeof(F)) > shared_factor);
  if (call.reads_p) start((R + 7) / 8);
  if (N == 0) return;
  // About as many blocks as multiprocessors: each reads all rows of x.
  const int64_t tiles = (N + 7) / 8;
  call.tiles = int((tiles + processors - 1) / processors);
  start((tiles + call.tiles - 1) / call.tiles);
}

template <class Launch>
void start_stream(const StreamCall& call, int64_t processors, int64_t shared_factor, Launch launch) {
  const bool wide = call.factor_type == DType::f32;
  if (call.type == DType::f16)
    wide ? start_stream<half_t, float>(call, processors, shared_factor, launch)
         : start_stream<half_t, half_t>(call, processors, shared_factor, launch);
  else
    wide ? start_stream<bf16_t, float>(call, processors, shared_factor, launch)
         : start_stream<bf16_t, bf16_t>(call, processors, shared_factor, launch);
}

}  // namespace masm::cuda
