// Blocks of matrix rows in the type that the skinny kernels read: in place, or widened to float in a small buffer
// that stays in cache, so x and dY are never copied as a whole.
#pragma once
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "skinny.h"

namespace masm::cpu {

using torch::headeronly::ScalarType;

struct FP16 {
  uint16_t bits;
};

// Memory for n elements, not initialised, on a cache line.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<A*>(std::aligned_alloc(64, (n * sizeof(A) / 64 + 1) * 64)), std::free) {
    if (!data_) throw std::bad_alloc();
  }
  A* get() const { return data_.get(); }

 private:
  std::unique_ptr<A, void (*)(void*)> data_;
};

// Rows per kernel call: few enough for a core's second-level cache, enough to reuse sums.
inline int64_t block_rows(int64_t row_bytes) {
  constexpr int64_t kBytes = 384 << 10, kStep = 24;  // kStep: a multiple of the height of every tile
  return std::clamp(kBytes / std::max<int64_t>(row_bytes, 1) / kStep * kStep, 2 * kStep, 4 * kStep);
}

// The kernels that read and sum float, or double.
template <class A>
const Skinny<A, A>& kernels_of() {
  if constexpr (std::is_same_v<A, double>)
    return kernels().f64;
  else
    return kernels().f32;
}

// f(T{}, S{}, A{}, kernels): the type in memory, the type the kernels read, the type of sums, the kernels for S.
template <class F>
void dispatch_rows(ScalarType type, const F& f) {
  const Kernels& k = kernels();
  switch (type) {
    case ScalarType::Float:
      return f(float{}, float{}, float{}, k.f32);
    case ScalarType::Double:
      return f(double{}, double{}, double{}, k.f64);
    case ScalarType::BFloat16:
      return k.bf16 ? f(BF16{}, BF16{}, float{}, *k.bf16) : f(BF16{}, float{}, float{}, k.f32);
    default:
      return f(FP16{}, float{}, float{}, k.f32);
  }
}

template <class T>
void widen(const T* in, float* out, int64_t n) {
  const auto* bits = reinterpret_cast<const uint16_t*>(in);
  std::is_same_v<T, BF16> ? kernels().convert.widen_bf16(bits, out, n) : kernels().convert.widen_fp16(bits, out, n);
}

template <class T>
void narrow(const float* in, T* out, int64_t n) {
  auto* bits = reinterpret_cast<uint16_t*>(out);
  std::is_same_v<T, BF16> ? kernels().convert.narrow_bf16(in, bits, n) : kernels().convert.narrow_fp16(in, bits, n);
}

// Blocks of at most `rows` rows of a contiguous matrix with L columns, stored as T, seen as S.
template <class T, class S>
class Rows {
 public:
  Rows(int64_t rows, int64_t L) : L_(L), room_(std::is_same_v<T, S> ? 0 : rows * L) {}

  const S* read(const T* base, int64_t row, int64_t rows) const {
    if constexpr (std::is_same_v<T, S>) {
      return base + row * L_;
    } else {
      widen(base + row * L_, room_.get(), rows * L_);
      return room_.get();
    }
  }

  // y = (accumulate ? y : 0) + c b + bias; see Skinny::add.
  template <class A>
  void add(const Skinny<S, A>& kernel, const A* c, int64_t R, const A* packed, const A* bias, bool accumulate,
           bool fine, T* base, int64_t row, int64_t rows, A* scratch) const {
    if constexpr (std::is_same_v<T, S>) {
      kernel.add(c, rows, R, packed, L_, bias, accumulate, fine, base + row * L_, scratch);
    } else {
      if (accumulate) read(base, row, rows);
      kernel.add(c, rows, R, packed, L_, bias, accumulate, fine, room_.get(), scratch);
      narrow(room_.get(), base + row * L_, rows * L_);
    }
  }

 private:
  int64_t L_;
  Buffer<S> room_;
};

}  // namespace masm::cpu
