// Vectors of one instruction set and the step of a contraction over them. For skinny_kernels.cpp only: everything has
// internal linkage, so that no file shares code compiled for a newer CPU.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
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
// Rows fetched ahead. The passes jump from row to row, which the hardware prefetcher does not follow: on an EPYC 9004
// this gains a factor of 1.3 to 1.6 if the rows come from memory.
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

// One step of the contraction over rows of S: the word that is broadcast, and how it multiplies.
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
    Halves low, high;  // sources of the words of the first and second half of the columns
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

// Two values as a word; only the first for float and double.
template <class S>
inline Word<S> pair(Acc<S> a, Acc<S> b) {
  if constexpr (Step<S>::kElements == 1) {
    return a;
  } else {
    return uint32_t(to_bf16(a)) | uint32_t(to_bf16(b)) << 16;
  }
}

}  // namespace
}  // namespace masm::cpu
