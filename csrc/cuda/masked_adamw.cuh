// The kernel of masm::masked_adamw_: one cooperative launch for every block of a model, in three sweeps with a grid
// barrier between them: nothing may be written before every gradient was checked.
//
// 1. Reads each live gradient, sums its squares and finds non-finite elements; computes the step's constants once per
//    segment. A masked block costs only its row of `segments`.
// 2. Updates, and sums gradient times the first moment before the step. Segments go in reverse order: the gradients
//    read last are still in the L2 cache.
// 3. Adds the sums of the segments to those of the blocks, in segment order: the same bits in every run. If the
//    segments are sorted by block, a block reads only its own, from the first, which the second sweep recorded.
#pragma once
#include <cstdint>

#include "device.cuh"
#include "masked_adamw.h"

namespace masm::cuda {

constexpr int kAdamWThreads = 128;

// Calls body(i, count) for elements i .. i + count - 1 of [0, n), `count` a compile-time constant: V at a time if
// `even` (they start at multiples of 16 bytes), one at a time at the ends.
template <int V, class Body>
__device__ inline void each_pack(int64_t n, int64_t begin, bool even, Body body) {
  const int64_t head = even ? (V - begin % V) % V : n;
  const int64_t packed = head < n ? (n - head) / V * V : 0;
  for (int64_t i = threadIdx.x; i < (head < n ? head : n); i += blockDim.x) body(i, Constant<1>());
  for (int64_t i = head + int64_t(threadIdx.x) * V; i < head + packed; i += int64_t(blockDim.x) * V)
    body(i, Constant<V>());
  for (int64_t i = head + packed + threadIdx.x; i < n; i += blockDim.x) body(i, Constant<1>());
}

__device__ inline bool starts_even(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The sum of squares of this thread's share of a gradient; NaN if a square is not finite: it would make a second moment
// infinite, which stops its element for good.
template <class P, class F>
__device__ inline double inspect(const AdamWParameter& own, const AdamWSegment& at, F inverse_scale) {
  const P* g = global<P>(own.grad) + at.begin;
  double sum = 0;
  F not_finite = 0;
  each_pack<16 / sizeof(P)>(at.end - at.begin, at.begin, starts_even(own.grad), [&](int64_t i, auto count) {
    const auto pack = load<decltype(count)::value>(g + i);
#pragma unroll
    for (int j = 0; j < decltype(count)::value; ++j) {
      const F value = F(pack.at[j]) * inverse_scale;
      const F square = value * value;
      not_finite += square - square;  // 0, or NaN of infinity and NaN
      sum += double(value) * double(value);
    }
  });
  return sum + double(not_finite);
}

// Updates this thread's share of a segment; returns the sum of gradient times the first moment before the step. Two
// functions: a test for the penalty inside the loop would cost registers.
template <class P, class F, bool kPenalty>
__device__ inline double update(const AdamWParameter& own, const AdamWSegment& at, F inverse_scale,
                                const AdamWStep<double>& step) {
  P* p = global<P>(own.param) + at.begin;
  const P* g = global<P>(own.grad) + at.begin;
  F *m = global<F>(own.exp_avg) + at.begin, *v = global<F>(own.exp_avg_sq) + at.begin;
  const F* e = kPenalty ? global<F>(own.penalty) + at.begin : nullptr;
  const bool even = starts_even(own.param) && starts_even(own.grad) && starts_even(own.exp_avg) &&
                    starts_even(own.exp_avg_sq) && starts_even(own.penalty);
  const AdamWStep<F> c = narrowed<F>(step);
  double sum = 0;
  each_pack<16 / sizeof(P)>(at.end - at.begin, at.begin, even, [&](int64_t i, auto count) {
    constexpr int V = decltype(count)::value;
    auto ps = load<V>(p + i);
    const auto gs = load<V>(g + i);
    auto ms = load<V>(m + i), vs = load<V>(v + i);
    decltype(ms) es{};
    if constexpr (kPenalty) es = load<V>(e + i);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      F wide = F(ps.at[j]);
      const F gradient = F(gs.at[j]) * inverse_scale;
      sum += double(gradient) * double(ms.at[j]);
      adamw_element(c, gradient, es.at[j], wide, ms.at[j], vs.at[j]);
      ps.at[j] = P(wide);
    }
    store(p + i, ps), store(m + i, ms), store(v + i, vs);
  });
  return sum;
}

// Calls f with zeros of the parameter's type and of the type that it is updated in.
template <class Function>
__device__ inline double with_types(DType type, Function f) {
  switch (type) {
    case DType::f32:
      return f(float(), float());
    case DType::f64:
      return f(double(), double());
    case DType::f16:
      return f(half_t(0.0f), float());
    default:
      return f(bf16_t(0.0f), float());
  }
}

// Flags of a thread, then of its block.
constexpr int kBad = 1, kInvalid = 2, kUnsorted = 4;
__device__ inline int flags_of_block(int flags) {
  int all = 0;
  for (int flag = kBad; flag <= kUnsorted; flag *= 2) all |= __syncthreads_or(flags & flag) ? flag : 0;
  return all;
}

__global__ void __launch_bounds__(kAdamWThreads)
    masked_adamw_kernel(const __grid_constant__ AdamWTables a, const __grid_constant__ AdamWList list,
                        const AdamWParameter* uploaded) {
  MASM_SHARED(double, scratch, 32);
  MASM_SHARED(int, seen, 1);  // the flags: a register live across the update would spill
  const auto parameter = [&](int64_t t) { return uploaded != nullptr ? uploaded[t] : list.at[t]; };
  const double inverse_scale = a.grad_scale ? 1 / double(*a.grad_scale) : 1;
  int flags = a.found_inf && *a.found_inf != 0 ? kBad : 0;

  for (int64_t b = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; b < a.B; b += int64_t(gridDim.x) * blockDim.x) {
    if (!(a.mask[b] >= 0 && a.mask[b] <= 1)) flags |= kInvalid;
    a.first[b] = a.S;  // until the second sweep
  }
  for (int64_t i = blockIdx.x; i < a.S; i += gridDim.x) {
    const AdamWSegment at = a.segments[i];
    if (i > 0 && a.segments[i - 1].block > at.block) flags |= kUnsorted;
    const bool inside = at.tensor >= 0 && at.tensor < a.T && at.block >= 0 && at.block < a.B;
    const AdamWParameter own = inside ? parameter(at.tensor) : AdamWParameter{};
    const float mask = inside ? a.mask[at.block] : 0;
    if (!inside || at.begin < 0 || at.begin > at.end || at.end > own.numel) {
      flags |= kInvalid;
      continue;
    }
    if (mask == 0) continue;
    const double power =
        block_sum(with_types(DType(own.type),
                             [&](auto p, auto f) { return inspect<decltype(p)>(own, at, decltype(f)(inverse_scale)); }),
                  scratch);
    if (power != power) flags |= kBad;
    if (threadIdx.x == 0) {
      const double* h = a.hyper + 5 * at.tensor;
      a.work[i].step = adamw_step<double>(h[0], h[1], h[2], h[3], h[4], mask, double(a.steps[at.block] + 1));
      a.work[i].power = power;
    }
  }
  flags = flags_of_block(flags);
  if (threadIdx.x == 0) a.flags[blockIdx.x] = flags;
  grid_barrier();

  flags = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) flags |= a.flags[block];
  flags = flags_of_block(flags);
  if (threadIdx.x == 0) seen[0] = flags;
  const bool taken = (flags & (kBad | kInvalid)) == 0;
  if (taken && !(flags & kUnsorted))
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.S; i += int64_t(gridDim.x) * blockDim.x)
      if (i == 0 || a.segments[i - 1].block != a.segments[i].block) a.first[a.segments[i].block] = i;
  if (taken && blockIdx.x < a.S) {
    const int64_t last = (a.S - 1 - int64_t(blockIdx.x)) / gridDim.x * gridDim.x + blockIdx.x;
    for (int64_t i = last; i >= blockIdx.x; i -= gridDim.x) {
      const AdamWSegment at = a.segments[i];
      if (a.mask[at.block] == 0) continue;
      const AdamWParameter own = parameter(at.tensor);
      const AdamWStep<double>& step = a.work[i].step;
      const double signal = block_sum(with_types(DType(own.type),
                                                 [&](auto p, auto f) {
                                                   using P = decltype(p);
                                                   using F = decltype(f);
                                                   return own.penalty != nullptr
                                                              ? update<P, F, true>(own, at, F(inverse_scale), step)
                                                              : update<P, F, false>(own, at, F(inverse_scale), step);
                                                 }),
                                      scratch);
      if (threadIdx.x == 0) a.work[i].signal = signal * step.signal_scale;
    }
  }
  grid_barrier();

  flags = seen[0];
  for (int64_t b = blockIdx.x; b < a.B; b += gridDim.x) {
    double signal = 0, power = 0;
    bool owns = false;
    if (taken && a.mask[b] != 0)
      for (int64_t i = (flags & kUnsorted ? 0 : a.first[b]) + threadIdx.x; i < a.S; i += blockDim.x) {
        if (a.segments[i].block == b)
          // before the first step there is no first moment: the block has no statistics yet
          signal += a.work[i].signal, power += a.work[i].step.signal_scale > 0 ? a.work[i].power : 0, owns = true;
        else if (!(flags & kUnsorted))
          break;
      }
    signal = block_sum(signal, scratch), power = block_sum(power, scratch), owns = __syncthreads_or(owns);
    if (threadIdx.x == 0) {
      a.stats[2 * b] = signal, a.stats[2 * b + 1] = power;
      if (owns) a.steps[b] += 1;
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) a.found[0] = flags & kInvalid ? 2.0f : flags & kBad ? 1.0f : 0.0f;
}

// Uploads parameters beyond those in the arguments, as many as one launch can carry.
__global__ void upload_parameters_kernel(const __grid_constant__ AdamWList list, AdamWParameter* out, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = list.at[i];
}

}  // namespace masm::cuda
