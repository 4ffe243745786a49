// The kernels of skinny.h for one instruction set: the build compiles this file once for each, with MASM_ISA naming the
// result. Nothing in here may come from a header that other files instantiate too (no <algorithm>, no <vector>): the
// linker could keep the copy made for a newer CPU.
//
// All three products are register tiles of one shape: `tile rows` scalars are broadcast against NV vectors, a step of
// the contraction at a time. A step is one element, or a pair of bfloat16 (one 32-bit word; vdpbf16ps).
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#else
#include <torch/headeronly/util/Half.h>
#endif

#include "skinny.h"

namespace masm::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kDotRows = 8, kAddRows = 6, kAddVectors = 4, kOuterTile = 16;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kDotRows = 6, kAddRows = 6, kAddVectors = 2, kOuterTile = 8;
#else
constexpr int kVectorBytes = 16, kDotRows = 6, kAddRows = 6, kAddVectors = 2, kOuterTile = 8;
#endif
constexpr int kDotVectors = 2;  // at most
// Rows that are fetched ahead. The passes jump from row to row, which the hardware does not foresee: on an EPYC 9004
// this is worth 1.3 to 1.6 times where the rows come from memory.
constexpr int64_t kAhead = 16, kAheadSteps = 24;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class E>
struct VectorOf {
  typedef E type __attribute__((vector_size(kVectorBytes)));
};
template <class E>
using Vector = typename VectorOf<E>::type;

template <class V, class E>
inline V load(const E* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class E>
inline void store(E* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// What a step of the contraction is for rows of S: the word that is broadcast, and how it multiplies.
template <class S>
struct Step {
  using A = S;
  using Word = S;
  static constexpr int kElements = 1;
  static inline Vector<A> multiply_add(Vector<A> sum, Word a, Vector<Word> b) { return sum + a * b; }
  static inline Word word(const S* p) { return *p; }
  static inline Word last_word(const S* p) { return *p; }
  static inline Vector<A> widen(const S* p) { return load<Vector<A>>(p); }
  static inline void narrow(S* p, Vector<A> v) { store(p, v); }
  // n columns of a row, n a multiple of two vectors
  static inline void lay_out(const S* p, const S*, Word* out, int64_t n) { std::memcpy(out, p, n * sizeof(S)); }
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fc0u) : uint16_t(rounded);  // no branch: loops vectorise
}
inline float from_bf16(uint16_t x) { return float_of(uint32_t(x) << 16); }

#if defined(__AVX512BF16__)
template <>
struct Step<BF16> {
  using A = float;
  using Word = uint32_t;  // elements 2l (low half) and 2l + 1
  static constexpr int kElements = 2;
  static inline Vector<float> multiply_add(Vector<float> sum, Word a, Vector<Word> b) {
    return Vector<float>(_mm512_dpbf16_ps(__m512(sum), (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)(__m512i)b));
  }
  static inline Word word(const BF16* p) {
    Word w;
    std::memcpy(&w, p, 4);
    return w;
  }
  static inline Word last_word(const BF16* p) { return p->bits; }
  static inline Vector<Word> words(const BF16* p) {
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    return __builtin_convertvector(load<Halves>(p), Vector<Word>);
  }
  static inline Vector<float> widen(const BF16* p) {
    const Vector<Word> bits = words(p) << 16;
    return load<Vector<float>>(&bits);
  }
  static inline void narrow(BF16* p, Vector<float> v) {
    const __m256bh half = _mm512_cvtneps_pbh(__m512(v));
    std::memcpy(p, &half, sizeof(half));
  }
  // n columns of two rows, side by side, n a multiple of two vectors; q is null for a row of zeros.
  static inline void lay_out(const BF16* p, const BF16* q, Word* out, int64_t n) {
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
    Halves low, high;  // where the words of the first and of the second half of the columns come from
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 2; ++k) low[2 * i + k] = i + 32 * k, high[2 * i + k] = 16 + i + 32 * k;
    for (int64_t i = 0; i < n; i += 32) {
      const Halves a = load<Halves>(p + i), b = q ? load<Halves>(q + i) : Halves{};
      store(out + i, _mm512_permutex2var_epi16(__m512i(a), __m512i(low), __m512i(b)));
      store(out + i + 16, _mm512_permutex2var_epi16(__m512i(a), __m512i(high), __m512i(b)));
    }
  }
};
#endif

template <class S>
using Acc = typename Step<S>::A;
template <class S>
using Word = typename Step<S>::Word;
template <class S>
constexpr int kWidth = kVectorBytes / int(sizeof(Acc<S>));
template <class S>
int64_t steps(int64_t n) {
  return (n + Step<S>::kElements - 1) / Step<S>::kElements;
}

// Two values as a word; for float and double there is only the first.
template <class S>
inline Word<S> pair(Acc<S> a, Acc<S> b) {
  if constexpr (Step<S>::kElements == 1) {
    return a;
  } else {
    return uint32_t(to_bf16(a)) | uint32_t(to_bf16(b)) << 16;
  }
}

// ---- dot: out = x b^T. Packed: [panel of R][step of L][vectors].

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
    const S *x_rows[kDotRows], *next_rows[kDotRows];  // past the end: the last row once more
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

// ---- add: y = c b. Packed: [panel of L][step of R][vectors], the last panel padded with zeros.

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

// c: rows of n words, and, if `fine`, n more for what their rounding left.
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
          out[2 * n + r] = rest - rest == 0 ? to_bf16(rest) : 0;  // 0 beside an infinite value
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
  S edge[kAddRows * kColumns] = {};  // columns past the end live here
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
      const int64_t last = least(kAddRows, rows - m) - 1;  // rows past it: the last one once more, same values
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

// ---- outer: o += c^T y. Tiles of TR rows of o and NV vectors of columns; the contraction runs down the rows of y.
// Columns go by panels of a few vectors, copied into `scratch` where they are read more than once or need rearranging.

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

// One panel: tiles of TR rows while they fit, then of TR / 2, ...
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
  auto* words = reinterpret_cast<Word<S>*>(scratch);             // c as [n, R], if that is not c itself
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

template <class S>
int64_t packed_size(int64_t R, int64_t L) {
  const int64_t for_dot = round_up(R, dot_vectors<S>(R) * kWidth<S>) * steps<S>(L);
  const int64_t for_add = steps<S>(R) * round_up(L, kAddWidth<S>);
  return for_dot > for_add ? for_dot : for_add;
}

template <class S>
int64_t scratch_size(int64_t rows, int64_t R) {
  const int64_t for_add = rows * 2 * steps<S>(R);
  const int64_t for_outer = steps<S>(rows) * (R + kOuterWidth<S>)+R * kOuterWidth<S>;
  return for_add > for_outer ? for_add : for_outer;
}

// ---- half precision

void widen_bf16(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(in[i]);
}
void narrow_bf16(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(in[i]);
}

#if defined(__F16C__)
void widen_fp16(const uint16_t* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < n; ++i) out[i] = _cvtsh_ss(in[i]);
}
void narrow_fp16(const float* in, uint16_t* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) out[i] = _cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT);
}
#else
void widen_fp16(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = float(c10::Half(in[i], c10::Half::from_bits()));
}
void narrow_fp16(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = c10::Half(in[i]).x;
}
#endif

template <class S>
constexpr Skinny<S, Acc<S>> skinny() {
  return {packed_size<S>, scratch_size<S>, pack_dot<S>, pack_add<S>, dot<S>, add<S>, outer<S>};
}

#if defined(__AVX512BF16__)
constexpr Skinny<BF16, float> kBF16 = skinny<BF16>();
constexpr const Skinny<BF16, float>* kBF16Pointer = &kBF16;
#else
constexpr const Skinny<BF16, float>* kBF16Pointer = nullptr;
#endif

}  // namespace

#define MASM_STRING(x) #x
#define MASM_NAME(x) MASM_STRING(x)
extern const Kernels MASM_ISA;
// constinit: nothing of this file may run before a CPU was found to have its instructions.
constinit const Kernels MASM_ISA = {MASM_NAME(MASM_ISA),
                                    skinny<float>(),
                                    skinny<double>(),
                                    kBF16Pointer,
                                    {widen_bf16, narrow_bf16, widen_fp16, narrow_fp16}};

}  // namespace masm::cpu
