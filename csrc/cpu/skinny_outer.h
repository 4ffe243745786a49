// o += c^T y. Tiles of TR rows of o and NV vectors of columns; the contraction runs down the rows of y. Columns are
// taken in panels of a few vectors, copied into `scratch` if they are read more than once or need rearranging.
#pragma once
#include "skinny_vectors.h"

namespace masm::cpu {
namespace {

template <class S>
constexpr int kOuterVectors = 4 * Step<S>::kElements;  // 256 bytes of a row of float or bfloat16
template <class S>
constexpr int64_t kOuterWidth = kOuterVectors<S> * kWidth<S>;

template <class S, int TR, int NV>
void outer_tile(const Word<S>* c, int64_t n, int64_t ldc, const Word<S>* y, int64_t ldy, Acc<S>* o, int64_t ldo) {
  using V = Vector<Acc<S>>;
  V sum[TR][NV];
  for (int r = 0; r < TR; ++r)
    for (int j = 0; j < NV; ++j) sum[r][j] = load<V>(o + r * ldo + j * kWidth<S>);
  for (int64_t m = 0; m < n; ++m, c += ldc, y += ldy) {
    Vector<Word<S>> b[NV];
    if (Step<S>::kElements == 1)
      for (int j = 0; j < NV; ++j) __builtin_prefetch(y + least(kAheadSteps, n - m - 1) * ldy + j * kWidth<S>);
    for (int j = 0; j < NV; ++j) b[j] = load<Vector<Word<S>>>(y + j * kWidth<S>);
    for (int r = 0; r < TR; ++r)
      for (int j = 0; j < NV; ++j) sum[r][j] = Step<S>::multiply_add(sum[r][j], c[r], b[j]);
  }
  for (int r = 0; r < TR; ++r)
    for (int j = 0; j < NV; ++j) store(o + r * ldo + j * kWidth<S>, sum[r][j]);
}

// One panel: tiles of TR rows while they fit, then TR / 2, and so on.
template <class S, int TR = kOuterTile>
void outer_panel(const Word<S>* c, int64_t n, int64_t R, const Word<S>* y, int64_t ldy, Acc<S>* o, int64_t ldo,
                 int64_t r = 0) {
  constexpr int NV = kOuterTile / TR < 4 ? kOuterTile / TR : 4;
  for (; r + TR <= R; r += TR)
    for (int j = 0; j < kOuterVectors<S>; j += NV)
      outer_tile<S, TR, NV>(c + r, n, R, y + j * kWidth<S>, ldy, o + r * ldo + j * kWidth<S>, ldo);
  if constexpr (TR > 1) outer_panel<S, TR / 2>(c, n, R, y, ldy, o, ldo, r);
}

template <class S>
void outer(const Acc<S>* c, int64_t rows, int64_t R, const S* y, int64_t L, Acc<S>* o, Acc<S>* scratch) {
  constexpr int64_t E = Step<S>::kElements, kColumns = kOuterWidth<S>;
  const int64_t n = steps<S>(rows);
  auto* words = reinterpret_cast<Word<S>*>(scratch);             // c as [n, R], unless c has that layout already
  auto* panel = words + (E == 1 ? 0 : n * R);                    // [n, kColumns]
  Acc<S>* edge = scratch + (E == 1 ? 0 : n * R) + n * kColumns;  // the last columns of o, padded: [R, kColumns]
  if constexpr (E == 2)
    for (int64_t m = 0; m < n; ++m) {
      const Acc<S>* first = c + 2 * m * R;
      const bool whole = 2 * m + 1 < rows;
      for (int64_t r = 0; r < R; ++r) words[m * R + r] = pair<S>(first[r], whole ? first[R + r] : 0);
    }
  const Word<S>* coefficients = E == 1 ? reinterpret_cast<const Word<S>*>(c) : words;
  for (int64_t l = 0; l < L; l += kColumns) {
    const int64_t live = least(kColumns, L - l);
    if (live < kColumns) {
      S first[kColumns] = {}, second[kColumns] = {};
      for (int64_t m = 0; m < n; ++m) {
        const bool whole = E * m + E <= rows;
        std::memcpy(first, y + E * m * L + l, live * sizeof(S));
        if (E == 2 && whole) std::memcpy(second, y + (E * m + 1) * L + l, live * sizeof(S));
        Step<S>::lay_out(first, whole ? second : nullptr, panel + m * kColumns, kColumns);
      }
      for (int64_t r = 0; r < R; ++r) std::memcpy(edge + r * kColumns, o + r * L + l, live * sizeof(Acc<S>));
      outer_panel<S>(coefficients, n, R, panel, kColumns, edge, kColumns);
      for (int64_t r = 0; r < R; ++r) std::memcpy(o + r * L + l, edge + r * kColumns, live * sizeof(Acc<S>));
    } else if (E == 1 && R <= kOuterTile) {
      outer_panel<S>(coefficients, n, R, reinterpret_cast<const Word<S>*>(y + l), L, o + l, L);
    } else {
      for (int64_t m = 0; m < n; ++m) {
        const S *first = y + E * m * L + l, *second = E * m + E <= rows ? first + (E - 1) * L : nullptr;
        for (int64_t i = E * m + kAhead; i < least(E * m + kAhead + E, rows); ++i)
          for (int64_t k = 0; k < kColumns; k += 64 / int64_t(sizeof(S))) __builtin_prefetch(y + i * L + l + k);
        Step<S>::lay_out(first, second, panel + m * kColumns, kColumns);
      }
      outer_panel<S>(coefficients, n, R, panel, kColumns, o + l, L);
    }
  }
}

}  // namespace
}  // namespace masm::cpu
