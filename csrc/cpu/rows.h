// Blocks of kRows matrix rows as float or double, whatever the storage type: half-precision rows are widened into a
// small buffer that stays in cache, so that no copy of x or dY is ever made.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "skinny.h"

namespace masm::cpu {

template <class T, class A>
void widen(const T* in, A* out, int64_t n) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    widen_bf16(reinterpret_cast<const uint16_t*>(in), out, n);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = A(in[i]);
  }
}

template <class T, class A>
void narrow(const A* in, T* out, int64_t n) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    narrow_bf16(in, reinterpret_cast<uint16_t*>(out), n);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = T(in[i]);
  }
}

// kRows rows of length n. load() points at rows [m, m + kRows) of a contiguous matrix; rows past M are zeros. store()
// writes the rows back (nothing to do where the pointers go straight into the matrix).
template <class T, class A>
class RowBlock {
 public:
  explicit RowBlock(int64_t n) : n_(n), buffer_(kRows * n) {}

  A* const* load(const T* base, int64_t m, int64_t M) {
    for (int i = 0; i < kRows; ++i) {
      A* row = buffer_.data() + i * n_;
      if (m + i >= M) {
        std::fill(row, row + n_, A(0));
        rows_[i] = row;
      } else if constexpr (std::is_same_v<T, A>) {
        rows_[i] = const_cast<A*>(base + (m + i) * n_);
      } else {
        widen(base + (m + i) * n_, row, n_);
        rows_[i] = row;
      }
    }
    return rows_;
  }

  void store(T* base, int64_t m, int64_t M) const {
    if constexpr (!std::is_same_v<T, A>) {
      for (int64_t i = 0; i < std::min<int64_t>(kRows, M - m); ++i) narrow(rows_[i], base + (m + i) * n_, n_);
    }
  }

 private:
  int64_t n_;
  std::vector<A> buffer_;
  A* rows_[kRows] = {};
};

}  // namespace masm::cpu
