// y = c b + bias. Packed b: [panel of L][step of R][vectors], the last panel padded with zeros.
#pragma once
#include "skinny_vectors.h"

namespace masm::cpu {
namespace {

template <class S>
constexpr int64_t kAddWidth = kAddVectors * kWidth<S>;

template <class S>
void pack_add(const Acc<S>* b, int64_t R, int64_t L, Acc<S>* packed) {
  constexpr int E = Step<S>::kElements;
  auto* out = reinterpret_cast<Word<S>*>(packed);
  for (int64_t l = 0; l < L; l += kAddWidth<S>) {
    const int64_t live = least(kAddWidth<S>, L - l);
    for (int64_t r = 0; r < R; r += E, out += kAddWidth<S>) {
      const Acc<S>* first = b + r * L + l;
      const Acc<S>* second = r + E <= R ? first + (E - 1) * L : nullptr;
      for (int64_t k = 0; k < live; ++k) out[k] = pair<S>(first[k], second ? second[k] : 0);
      for (int64_t k = live; k < kAddWidth<S>; ++k) out[k] = 0;
    }
  }
}

// c: rows of n words; if `fine`, followed by n words of their rounding errors.
template <class S>
__attribute__((always_inline)) inline void add_tile(const Word<S>* const* c, int64_t n, bool fine, const Word<S>* panel,
                                                    Vector<Acc<S>> (&sum)[kAddRows][kAddVectors]) {
  for (int64_t r = 0; r < n; ++r, panel += kAddWidth<S>) {
    Vector<Word<S>> b[kAddVectors];
    for (int j = 0; j < kAddVectors; ++j) b[j] = load<Vector<Word<S>>>(panel + j * kWidth<S>);
    for (int i = 0; i < kAddRows; ++i)
      for (int j = 0; j < kAddVectors; ++j) sum[i][j] = Step<S>::multiply_add(sum[i][j], c[i][r], b[j]);
    if (fine)
      for (int i = 0; i < kAddRows; ++i)
        for (int j = 0; j < kAddVectors; ++j) sum[i][j] = Step<S>::multiply_add(sum[i][j], c[i][n + r], b[j]);
  }
}

// c [rows, R] as words [rows, n] or, if `fine`, [rows, 2 n]. Nothing to do for float and double.
template <class S>
const Word<S>* coefficient_words(const Acc<S>* c, int64_t rows, int64_t R, bool fine, Acc<S>* scratch) {
  if constexpr (Step<S>::kElements == 1) {
    return c;
  } else {
    const int64_t n = steps<S>(R);
    auto* out = reinterpret_cast<uint16_t*>(scratch);
    for (int64_t m = 0; m < rows; ++m, c += R) {
      for (int64_t r = 0; r < R; ++r) out[r] = to_bf16(c[r]);
      if (fine)
        for (int64_t r = 0; r < R; ++r) {
          const float rest = c[r] - from_bf16(out[r]);
          out[2 * n + r] = rest - rest == 0 ? to_bf16(rest) : 0;  // 0 if the value is infinite
        }
      for (int part = 0; part <= int(fine); ++part, out += 2 * n)
        if (R < 2 * n) out[R] = 0;
    }
    return reinterpret_cast<const Word<S>*>(scratch);
  }
}

template <class S>
void add(const Acc<S>* c, int64_t rows, int64_t R, const Acc<S>* packed, int64_t L, const Acc<S>* bias, bool accumulate,
         bool fine, S* y, Acc<S>* scratch) {
  using V = Vector<Acc<S>>;
  constexpr int64_t kColumns = kAddWidth<S>;
  fine = fine && Step<S>::kElements == 2;
  const int64_t n = steps<S>(R), ldc = fine ? 2 * n : n;
  const Word<S>* words = coefficient_words<S>(c, rows, R, fine, scratch);
  const auto* panel = reinterpret_cast<const Word<S>*>(packed);
  S edge[kAddRows * kColumns] = {};  // holds the columns past the end
  for (int64_t l = 0; l < L; l += kColumns, panel += n * kColumns) {
    const int64_t live = least(kColumns, L - l);
    V start[kAddVectors] = {};
    if (bias) {
      Acc<S> padded[kColumns] = {};
      for (int64_t k = 0; k < live; ++k) padded[k] = bias[l + k];
      for (int j = 0; j < kAddVectors; ++j) start[j] = load<V>(padded + j * kWidth<S>);
    }
    for (int64_t m = 0; m < rows; m += kAddRows) {
      const Word<S>* c_rows[kAddRows];
      S* y_rows[kAddRows];
      const int64_t last = least(kAddRows, rows - m) - 1;  // rows past it repeat the last one, with the same values
      for (int i = 0; i < kAddRows; ++i) {
        const int64_t row = m + least(i, last);
        c_rows[i] = words + row * ldc;
        y_rows[i] = live == kColumns ? y + row * L + l : edge + least(i, last) * kColumns;
      }
      for (int64_t i = m + kAddRows; i < least(m + 2 * kAddRows, rows); ++i)
        for (int64_t k = 0; k < kColumns; k += 64 / int64_t(sizeof(S))) __builtin_prefetch(y + i * L + l + k, 1);
      if (live < kColumns && accumulate)
        for (int64_t i = 0; i <= last; ++i)
          for (int64_t k = 0; k < live; ++k) edge[i * kColumns + k] = y[(m + i) * L + l + k];
      V sum[kAddRows][kAddVectors];
      for (int i = 0; i < kAddRows; ++i)
        for (int j = 0; j < kAddVectors; ++j) sum[i][j] = start[j];
      add_tile<S>(c_rows, n, fine, panel, sum);
      if (accumulate)
        for (int i = 0; i < kAddRows; ++i)
          for (int j = 0; j < kAddVectors; ++j) sum[i][j] += Step<S>::widen(y_rows[i] + j * kWidth<S>);
      for (int i = 0; i < kAddRows; ++i)
        for (int j = 0; j < kAddVectors; ++j) Step<S>::narrow(y_rows[i] + j * kWidth<S>, sum[i][j]);
      if (live < kColumns)
        for (int64_t i = 0; i <= last; ++i)
          for (int64_t k = 0; k < live; ++k) y[(m + i) * L + l + k] = edge[i * kColumns + k];
    }
  }
}

}  // namespace
}  // namespace masm::cpu
