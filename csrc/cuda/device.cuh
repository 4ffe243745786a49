// The device features that the kernels use, by name: intrinsics under nvcc, plain C++ without it
// (tests/cuda_emulation), so that the same kernel source runs on a CPU.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// A shared array of the block.
#define MASM_SHARED(T, name, n) __shared__ T name[n]
#else
#include "emulate.h"
#endif

namespace masm::cuda {

using half_t = __half;
using bf16_t = __nv_bfloat16;

constexpr uint32_t kAllLanes = 0xffffffffu;

// A compile-time int as a function argument.
template <int n>
struct Constant {
  static constexpr int value = n;
};

// Marks a pointer loaded from memory as global: otherwise the compiler emits generic loads.
template <class T>
__device__ inline T* global(void* p) {
#if defined(__CUDACC__)
  __builtin_assume(__isGlobal(p));
#endif
  return static_cast<T*>(p);
}
template <class T>
__device__ inline const T* global(const void* p) {
  return global<T>(const_cast<void*>(p));
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ inline T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char masm_dynamic_shared[];
  return reinterpret_cast<T*>(masm_dynamic_shared);
#else
  return reinterpret_cast<T*>(emulation::grid->block->dynamic.get());
#endif
}

// A barrier across the grid that makes all earlier writes visible. Cooperative launches only.
#if defined(__CUDACC__)
__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }
#else
#define grid_barrier emulated_grid_barrier
#endif

// N elements moved as one, in units of up to 16 bytes.
template <class T, int N = int(16 / sizeof(T))>
struct alignas(N * sizeof(T) % 16 == 0 ? 16 : alignof(T)) Pack {
  T at[N];
};

// Explicit 16-byte accesses: the compiler would split the copy of a structure.
template <class T, int N>
union PackBytes {
  static constexpr int kQuads = int(N * sizeof(T) / 16);
  Pack<T, N> pack;
  uint4 quads[kQuads > 0 ? kQuads : 1];
  __device__ PackBytes() {}
};
template <int N, class T>
__device__ inline Pack<T, N> load(const T* p) {
  if constexpr (PackBytes<T, N>::kQuads == 0) {
    return *reinterpret_cast<const Pack<T, N>*>(p);
  } else {
    PackBytes<T, N> bytes;
#pragma unroll
    for (int i = 0; i < bytes.kQuads; ++i) bytes.quads[i] = reinterpret_cast<const uint4*>(p)[i];
    return bytes.pack;
  }
}
template <int N, class T>
__device__ inline void store(T* p, const Pack<T, N>& pack) {
  if constexpr (PackBytes<T, N>::kQuads == 0) {
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
  } else {
    PackBytes<T, N> bytes;
    bytes.pack = pack;
#pragma unroll
    for (int i = 0; i < bytes.kQuads; ++i) reinterpret_cast<uint4*>(p)[i] = bytes.quads[i];
  }
}

template <class T>
__device__ inline T warp_sum(T value) {
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(kAllLanes, value, d);
  return value;
}

// The sum over the threads of a block of at most 1024 (a multiple of 32), for all of them, always in the same order.
// `scratch`: 32 shared elements, separate for each sum between two barriers.
template <class T>
__device__ inline T block_sum(T value, T* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += scratch[warp];
  __syncthreads();  // before the scratch is reused
  return sum;
}

}  // namespace masm::cuda
