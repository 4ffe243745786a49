// The tensor cores' product of half-precision tiles; without nvcc a plain C++ version of it, for the emulation.
#pragma once
#include <cstring>

#include "device.cuh"

namespace masm::cuda {

// c [16, 8] += a [16, 16] b [8, 16]^T by a whole warp, accumulated in float32. Lane l with g = l / 4, t = l % 4 holds,
// two elements a word: a[0], a[2] row g, columns 2t and 2t + 8 of a (a[1], a[3]: row g + 8); b[0], b[1] the same of row
// g of b; c[0], c[1] row g, columns 2t and 2t + 1 of c (c[2], c[3]: row g + 8).
template <class T>
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if defined(__CUDACC__)

#define MASM_MMA(T, name)                                                                                 \
  template <>                                                                                             \
  __device__ inline void mma_m16n8k16<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                            \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                            \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
  }
MASM_MMA(__nv_bfloat16, "bf16")
MASM_MMA(__half, "f16")
#undef MASM_MMA

#else

template <class T>
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Shown {
    T a[4][2], b[2][2];
  } mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  emulation::exchange(mine, kAllLanes, Place::current(), [&](auto shown) {
    const unsigned g = emulation::lane() / 4, t = emulation::lane() % 4;
    for (unsigned i = 0; i < 4; ++i)
      for (unsigned k = 0; k < 16; ++k) {  // word k / 8 of the lane k % 8 / 2 that holds column k
        const Shown &row = shown(4 * g + k % 8 / 2), &column = shown(4 * (2 * t + i % 2) + k % 8 / 2);
        c[i] += float(row.a[2 * (k / 8) + i / 2][k % 2]) * float(column.b[k / 8][k % 2]);
      }
    return 0;
  });
}

#endif

}  // namespace masm::cuda
