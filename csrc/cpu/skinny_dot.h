// out = x b^T. Packed b: [panel of R][step of L][vectors].
#pragma once
#include "skinny_vectors.h"

namespace masm::cpu {
namespace {

template <class S>
int dot_vectors(int64_t R) {
  return R > kWidth<S> ? kDotVectors : 1;
}

template <class S>
void pack_dot(const Acc<S>* b, int64_t R, int64_t L, Acc<S>* packed) {
  constexpr int E = Step<S>::kElements;
  const int64_t width = dot_vectors<S>(R) * kWidth<S>;
  auto* out = reinterpret_cast<Word<S>*>(packed);
  for (int64_t r0 = 0; r0 < R; r0 += width) {
    const int64_t live = least(width, R - r0);
    for (int64_t l = 0; l < L; l += E, out += width) {
      const Acc<S>* column = b + r0 * L + l;
      const bool whole = l + E <= L;
      for (int64_t r = 0; r < live; ++r, column += L) out[r] = pair<S>(column[0], whole ? column[E - 1] : 0);
      for (int64_t r = live; r < width; ++r) out[r] = 0;
    }
  }
}

template <class S, int NV>
void dot_tile(const S* const* x, const S* const* next, const Word<S>* packed, int64_t L, Acc<S>* out) {
  constexpr int E = Step<S>::kElements, kLine = 64 / int(sizeof(S));
  Vector<Acc<S>> sum[kDotRows][NV] = {};
  Vector<Word<S>> b[NV];
  int64_t l = 0;
  for (; l + E <= L; l += E) {
    if (l % kLine == 0)
      for (int i = 0; i < kDotRows; ++i) __builtin_prefetch(next[i] + l);
    for (int j = 0; j < NV; ++j, packed += kWidth<S>) b[j] = load<Vector<Word<S>>>(packed);
    for (int i = 0; i < kDotRows; ++i)
      for (int j = 0; j < NV; ++j) sum[i][j] = Step<S>::multiply_add(sum[i][j], Step<S>::word(x[i] + l), b[j]);
  }
  if (E == 2 && l < L) {
    for (int j = 0; j < NV; ++j, packed += kWidth<S>) b[j] = load<Vector<Word<S>>>(packed);
    for (int i = 0; i < kDotRows; ++i)
      for (int j = 0; j < NV; ++j) sum[i][j] = Step<S>::multiply_add(sum[i][j], Step<S>::last_word(x[i] + l), b[j]);
  }
  for (int i = 0; i < kDotRows; ++i)
    for (int j = 0; j < NV; ++j) store(out + (i * NV + j) * kWidth<S>, sum[i][j]);
}

template <class S>
void dot(const S* x, int64_t rows, int64_t L, const Acc<S>* packed, int64_t R, Acc<S>* out) {
  const int NV = dot_vectors<S>(R);
  const int64_t width = NV * kWidth<S>;
  Acc<S> tile[kDotRows * kDotVectors * kWidth<S>];
  for (int64_t m = 0; m < rows; m += kDotRows) {
    const S *x_rows[kDotRows], *next_rows[kDotRows];  // past the end: the last row again
    for (int i = 0; i < kDotRows; ++i) {
      x_rows[i] = x + least(m + i, rows - 1) * L;
      next_rows[i] = x + least(m + kDotRows + i, rows - 1) * L;
    }
    const auto* panel = reinterpret_cast<const Word<S>*>(packed);
    for (int64_t r = 0; r < R; r += width, panel += steps<S>(L) * width) {
      if (NV == 1)
        dot_tile<S, 1>(x_rows, next_rows, panel, L, tile);
      else
        dot_tile<S, kDotVectors>(x_rows, next_rows, panel, L, tile);
      const int64_t live = least(width, R - r);
      for (int64_t i = 0; i < least(kDotRows, rows - m); ++i)
        for (int64_t k = 0; k < live; ++k) out[(m + i) * R + r + k] = tile[i * width + k];
    }
  }
}

}  // namespace
}  // namespace masm::cpu
