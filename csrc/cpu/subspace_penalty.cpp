// masm::subspace_penalty on the CPU: a layer is one thread's work, with its weight read panel by panel, so that
// half-precision weights are widened in cache and nothing depends on the number of threads.
//
// The four products with the weight (u W, v W^T and those two times W^T and W again) are thin: R columns. They are
// computed transposed, [N, R] and [D, R], with a few rows of the result in registers, one element of the weight
// broadcast over R: no horizontal sums, and 1.5 to 2 times MKL's rate at R = 16 (Zen 4, AVX-512, one thread).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "dense.h"
#include "rows.h"
#include "simd.h"

namespace masm::cpu {
namespace {

// Singular values below this share of the root mean square count as this large (SPECTRAL_FLOOR of the formula).
constexpr double kSpectralFloor = 1e-3;
// Elements of the weight that are worked on at a time: they should stay in a core's L2 cache, widened.
constexpr int64_t kPanelElements = 98304;
// Rows of a gradient put together at a time.
constexpr int64_t kBlockRows = 64;

int64_t panel_rows(int64_t N, int64_t D) {
  const int64_t rows = std::max<int64_t>(24, kPanelElements / std::max<int64_t>(D, 1) / 24 * 24);
  return std::max<int64_t>(1, std::min(N, rows));
}

// R rounded up to the 8 columns that the products work on.
int64_t padded(int64_t R) { return (R + 7) / 8 * 8; }

template <class A>
struct Layer {
  const void* weight;  // [N, D]
  const A *u, *s, *v, *s0;
  double weight_norm2;
  const int64_t* offsets;  // [K + 1]
  int64_t K, N, D, R;
  A *du, *dv, *ds;  // of orthogonality; those of spectral lie P elements further. Null where they are not needed.
  int64_t P;
  double orthogonality, spectral;
};

// What one thread needs for the largest of its layers; Q = padded(R).
template <class A>
struct Workspace {
  Workspace(int64_t N, int64_t D, int64_t R, int64_t panel) : Workspace(N, D, padded(R), R, panel) {}

  Buffer<A> rows;                 // [N, 2Q]: u^T | (v W^T)^T
  Buffer<A> vt;                   // [D, Q]: v^T
  Buffer<A> cols;                 // [D, 2Q]: (u W)^T | (v W^T W)^T
  Buffer<A> back;                 // [N, Q]: (u W W^T)^T
  Buffer<A> weight;               // a panel of W, widened
  Buffer<A> mix;                  // [R, 2Q]: coefficients of u (or v) in the two gradients
  Buffer<A> block;                // [kBlockRows, 2Q]
  Buffer<double> wide;            // [max(N, D), Q]
  Buffer<double> gram_u, gram_v;  // [Q, Q]

 private:
  Workspace(int64_t N, int64_t D, int64_t Q, int64_t R, int64_t panel)
      : rows(N * 2 * Q),
        vt(D * Q),
        cols(D * 2 * Q),
        back(N * Q),
        weight(panel),
        mix(R * 2 * Q),
        block(kBlockRows * 2 * Q),
        wide(std::max(N, D) * Q),
        gram_u(Q * Q),
        gram_v(Q * Q) {}
};

struct Base {
  static constexpr int bytes = 16, registers = 16;
};
struct V3 {
  static constexpr int bytes = 32, registers = 16;
};
struct V4 {
  static constexpr int bytes = 64, registers = 32;
};

// Memory that is needed soon: the products ask for it while they compute, some cache lines every four of their steps.
class Ahead {
 public:
  void add(const void* from, int64_t bytes) {
    if (count_ < kRanges && bytes > 0)
      begin_[count_] = static_cast<const char*>(from), end_[count_++] = static_cast<const char*>(from) + bytes;
  }
  void set_lines(int lines) { lines_ = lines; }
  MASM_INLINE void fetch() {
    for (int i = 0; i < lines_ && next_ < count_; ++i) {
      __builtin_prefetch(begin_[next_], 0, 2);
      if ((begin_[next_] += 64) >= end_[next_]) ++next_;
    }
  }

 private:
  static constexpr size_t kRanges = 4;
  const char *begin_[kRanges], *end_[kRanges];
  size_t count_ = 0, next_ = 0;
  int lines_ = 1;
};

// c[i, :] = sum_k a[i * ai + k * ak] * b[k, :], Rows rows of Width columns, all in registers; added to c if `add`.
template <class A, int Bytes, int Rows, int Width>
MASM_INLINE void tile(const A* a, int64_t ai, int64_t ak, const A* b, int64_t ldb, int64_t K, A* c, int64_t ldc,
                      bool add, Ahead& ahead) {
  typedef A Vector __attribute__((vector_size(Bytes), aligned(alignof(A)), may_alias));
  constexpr int kLanes = Bytes / int(sizeof(A)), kVectors = Width / kLanes;
  Vector sum[Rows][kVectors];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = add ? *reinterpret_cast<const Vector*>(c + i * ldc + j * kLanes) : Vector{};
  for (int64_t k0 = 0; k0 < K; k0 += 4) {
    ahead.fetch();
    const int64_t end = std::min(K, k0 + 4);
    for (int64_t k = k0; k < end; ++k) {
      Vector row[kVectors];
      for (int j = 0; j < kVectors; ++j) row[j] = *reinterpret_cast<const Vector*>(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const A x = a[i * ai + k * ak];
        for (int j = 0; j < kVectors; ++j) sum[i][j] += x * row[j];
      }
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < kVectors; ++j) *reinterpret_cast<Vector*>(c + i * ldc + j * kLanes) = sum[i][j];
}

template <class Isa, class A, int Width>
MASM_INLINE void thin_columns(const A* a, int64_t ai, int64_t ak, const A* b, int64_t ldb, int64_t M, int64_t K, A* c,
                              int64_t ldc, bool add, Ahead& ahead) {
  constexpr int kBytes = std::min<int>(Isa::bytes, Width * sizeof(A)), kVectors = Width * int(sizeof(A)) / kBytes;
  constexpr int kRows = std::clamp((Isa::registers - 4) / kVectors, 1, 8);
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows)
    tile<A, kBytes, kRows, Width>(a + m * ai, ai, ak, b, ldb, K, c + m * ldc, ldc, add, ahead);
  for (; m < M; ++m) tile<A, kBytes, 1, Width>(a + m * ai, ai, ak, b, ldb, K, c + m * ldc, ldc, add, ahead);
}

// c [M, Q] = a [M, K] b [K, Q], or added to it; element (m, k) of a is a[m * ai + k * ak], Q a multiple of 8.
template <class Isa, class A>
MASM_INLINE void thin_product(const A* a, int64_t ai, int64_t ak, const A* b, int64_t ldb, int64_t M, int64_t K,
                              int64_t Q, A* c, int64_t ldc, bool add, Ahead& ahead) {
  int64_t q = 0;
  for (; q + 16 <= Q; q += 16) thin_columns<Isa, A, 16>(a, ai, ak, b + q, ldb, M, K, c + q, ldc, add, ahead);
  if (q < Q) thin_columns<Isa, A, 8>(a, ai, ak, b + q, ldb, M, K, c + q, ldc, add, ahead);
}

// Eight rows of eight, transposed in registers: halves, quarters and single elements change places.
template <class A>
MASM_INLINE void transpose8(const A* in, int64_t ld_in, A* out, int64_t ld_out) {
  typedef A Vector __attribute__((vector_size(8 * sizeof(A)), aligned(alignof(A)), may_alias));
  Vector x[8];
  for (int i = 0; i < 8; ++i) x[i] = *reinterpret_cast<const Vector*>(in + i * ld_in);
#if defined(__clang__)
#define MASM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> Index __attribute__((vector_size(8 * sizeof(A))));
#define MASM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif
#define MASM_EXCHANGE(i, j, low, high)                                                  \
  {                                                                                     \
    const Vector a = MASM_SHUFFLE(x[i], x[j], low), b = MASM_SHUFFLE(x[i], x[j], high); \
    x[i] = a, x[j] = b;                                                                 \
  }
#define MASM_LOW4 0, 1, 2, 3, 8, 9, 10, 11
#define MASM_HIGH4 4, 5, 6, 7, 12, 13, 14, 15
#define MASM_LOW2 0, 1, 8, 9, 4, 5, 12, 13
#define MASM_HIGH2 2, 3, 10, 11, 6, 7, 14, 15
#define MASM_LOW1 0, 8, 2, 10, 4, 12, 6, 14
#define MASM_HIGH1 1, 9, 3, 11, 5, 13, 7, 15
  for (int i = 0; i < 4; ++i) MASM_EXCHANGE(i, i + 4, MASM_LOW4, MASM_HIGH4)
  for (int i = 0; i < 8; i += 4)
    for (int k = i; k < i + 2; ++k) MASM_EXCHANGE(k, k + 2, MASM_LOW2, MASM_HIGH2)
  for (int i = 0; i < 8; i += 2) MASM_EXCHANGE(i, i + 1, MASM_LOW1, MASM_HIGH1)
  for (int i = 0; i < 8; ++i) *reinterpret_cast<Vector*>(out + i * ld_out) = x[i];
}

// out[j, i] = in[i, j] for i < rows, j < cols.
template <class A>
MASM_INLINE void transpose(const A* in, int64_t ld_in, int64_t rows, int64_t cols, A* out, int64_t ld_out) {
  for (int64_t i0 = 0; i0 < rows; i0 += 8)
    for (int64_t j0 = 0; j0 < cols; j0 += 8) {
      const A* from = in + i0 * ld_in + j0;
      A* to = out + j0 * ld_out + i0;
      if (i0 + 8 <= rows && j0 + 8 <= cols) {
        transpose8(from, ld_in, to, ld_out);
      } else {
        for (int64_t j = 0; j < std::min<int64_t>(8, cols - j0); ++j)
          for (int64_t i = 0; i < std::min<int64_t>(8, rows - i0); ++i) to[j * ld_out + i] = from[i * ld_in + j];
      }
    }
}

// x [R, n] -> out [n, ld], columns R .. Q zero.
template <class A>
MASM_INLINE void transpose_factor(const A* x, int64_t R, int64_t Q, int64_t n, A* out, int64_t ld) {
  transpose(x, n, R, n, out, ld);
  for (int64_t i = 0; R < Q && i < n; ++i) std::fill(out + i * ld + R, out + i * ld + Q, A(0));
}

template <class T, class A>
MASM_INLINE const A* widen_panel(const T* in, A* out, int64_t n) {
  if constexpr (std::is_same_v<T, A>) {
    return in;
  } else {
    widen(in, out, n);
    return out;
  }
}

// out [Q, Q] = x^T x for x [n, ld], columns up to Q, in float64: the losses see the small difference to the identity.
template <class Isa, class A>
MASM_INLINE void gram(const A* x, int64_t ld, int64_t n, int64_t Q, double* wide, double* out) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t q = 0; q < Q; ++q) wide[i * Q + q] = double(x[i * ld + q]);
  Ahead none;
  for (int64_t i = 0; i < Q; i += 8)
    for (int64_t j = i; j < Q; j += 8)
      thin_product<Isa, double>(wide + i, 1, Q, wide + j, Q, 8, n, 8, out + i * Q + j, Q, false, none);
  for (int64_t i = 0; i < Q; ++i)
    for (int64_t j = 0; j < i; ++j) out[i * Q + j] = out[j * Q + i];
}

template <class A>
MASM_INLINE double sum_of_squares(const A* x, int64_t ld, int64_t rows, int64_t Q) {
  double total[8] = {};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t q = 0; q < Q; q += 8)
      for (int j = 0; j < 8; ++j) total[j] += double(x[i * ld + q + j]) * double(x[i * ld + q + j]);
  return std::accumulate(total, total + 8, 0.0);
}

// The two gradients of one factor (u, or v): mix^T times the factor, plus `product` and `share` of their columns
// scaled. factor and share [n, ld...] and product [n, ...] are transposed, out and out + P are [R, n].
template <class Isa, class A>
MASM_INLINE void factor_gradients(const A* factor, int64_t ld_factor, const A* product, int64_t ld_product, A scale,
                                  const A* share, int64_t ld_share, const A* share_scale, const A* mix, int64_t n,
                                  int64_t R, int64_t Q, A* block, A* out, int64_t P) {
  Ahead none;
  for (int64_t i0 = 0; i0 < n; i0 += kBlockRows) {
    const int64_t live = std::min(kBlockRows, n - i0);
    thin_product<Isa, A>(factor + i0 * ld_factor, ld_factor, 1, mix, 2 * Q, live, R, 2 * Q, block, 2 * Q, false, none);
    for (int64_t i = 0; i < live; ++i) {
      A* row = block + i * 2 * Q;
      const A* a = product + (i0 + i) * ld_product;
      const A* b = share + (i0 + i) * ld_share;
      for (int64_t q = 0; q < Q; ++q) row[q] += scale * a[q];
      for (int64_t q = 0; q < Q; ++q) row[Q + q] += share_scale[q] * b[q];
    }
    transpose(block, 2 * Q, live, R, out + i0, n);
    transpose(block + Q, 2 * Q, live, R, out + P + i0, n);
  }
}

// What the first steps of a layer read.
template <class T, class A>
MASM_INLINE void ahead_of(const Layer<A>& next, Ahead& ahead) {
  ahead.add(next.u, next.R * next.N * int64_t(sizeof(A)));
  ahead.add(next.v, next.R * next.D * int64_t(sizeof(A)));
  ahead.add(next.weight, std::min(next.N, panel_rows(next.N, next.D)) * next.D * int64_t(sizeof(T)));
}

template <class Isa, class T, class A>
MASM_INLINE void penalize(Layer<A>& layer, const Layer<A>* next, Workspace<A>& space) {
  const int64_t N = layer.N, D = layer.D, R = layer.R, Q = padded(R), panel = panel_rows(N, D);
  const bool gradients = layer.du != nullptr;
  const T* weight = static_cast<const T*>(layer.weight);
  A *rows = space.rows.get(), *vt = space.vt.get(), *cols = space.cols.get(), *back = space.back.get();
  double *gram_u = space.gram_u.get(), *gram_v = space.gram_v.get();

  transpose_factor(layer.u, R, Q, N, rows, 2 * Q);
  transpose_factor(layer.v, R, Q, D, vt, Q);
  gram<Isa, A>(rows, 2 * Q, N, Q, space.wide.get(), gram_u);
  gram<Isa, A>(vt, Q, D, Q, space.wide.get(), gram_v);
  if (N == 0) std::fill_n(cols, D * 2 * Q, A(0));
  const int64_t columns = gradients ? 2 * Q : Q;
  for (int64_t n = 0; n < N; n += panel) {
    const int64_t live = std::min(panel, N - n);
    Ahead ahead;
    ahead.add(weight + (n + live) * D, std::min(panel, N - n - live) * D * int64_t(sizeof(T)));
    if (n + live == N && !gradients && next) ahead_of<T>(*next, ahead);
    const A* w = widen_panel(weight + n * D, space.weight.get(), live * D);
    thin_product<Isa, A>(w, D, 1, vt, Q, live, D, Q, rows + n * 2 * Q + Q, 2 * Q, false, ahead);
    thin_product<Isa, A>(w, 1, D, rows + n * 2 * Q, 2 * Q, D, live, columns, cols, 2 * Q, n > 0, ahead);
  }

  const double tiny = double(std::numeric_limits<A>::min());
  const double inverse_norm2 = 1 / std::max(layer.weight_norm2, tiny);
  double between = 0, inside = 0, artifact = 0, cross = 0, s02 = 0, drift = 0;
  for (int64_t r = 0; r < R; ++r) s02 += double(layer.s0[r]) * double(layer.s0[r]);
  const double base = layer.weight_norm2 + s02, base_or_tiny = std::max(base, tiny);
  const double floor = kSpectralFloor * kSpectralFloor * base / double(std::max<int64_t>(1, std::min(N, D)));

  std::vector<double> overlap(Q, 0.0), moved(R, 0.0), drift_slope(R, 0.0);  // u_r W v_r; d change / d s; d drift / d s
  for (int64_t d = 0; d < D; ++d)
    for (int64_t q = 0; q < Q; ++q) overlap[q] += double(cols[d * 2 * Q + q]) * double(vt[d * Q + q]);
  std::vector<int64_t> member(R, 0);
  for (int64_t k = 0; k < layer.K; ++k) {
    const int64_t begin = layer.offsets[k], end = layer.offsets[k + 1];
    double norm2 = 0, distance2 = 0;
    for (int64_t r = begin; r < end; ++r) {
      const double change = double(layer.s[r]) - double(layer.s0[r]);
      norm2 += double(layer.s0[r]) * double(layer.s0[r]), distance2 += change * change, member[r] = k;
    }
    const double inverse = 1 / std::max({norm2, floor * double(end - begin), tiny});
    drift += distance2 * inverse;
    for (int64_t r = begin; r < end; ++r) drift_slope[r] = 2 * (double(layer.s[r]) - double(layer.s0[r])) * inverse;
  }
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t j = 0; j < R; ++j) {
      const double a = gram_u[i * Q + j], b = gram_v[i * Q + j], one = i == j;
      if (member[i] == member[j])
        inside += (a - one) * (a - one) + (b - one) * (b - one);
      else
        between += (a * a + b * b) / 2;
      moved[i] += double(layer.s[j]) * a * b;
    }
    cross += double(layer.s[i]) * overlap[i];
    artifact += double(layer.s[i]) * moved[i];
    moved[i] = 2 * (overlap[i] + moved[i]);
  }
  const double interference = sum_of_squares(rows + Q, 2 * Q, N, Q) + sum_of_squares(cols, 2 * Q, D, Q);
  layer.orthogonality = between + inside + interference * inverse_norm2;
  const double change = (2 * cross + artifact - s02) / base_or_tiny;
  layer.spectral = change * change + drift;
  if (!gradients) return;

  // From the last panel, which is still in cache, to the first.
  for (int64_t n = (N - 1) / panel * panel; n >= 0 && N > 0; n -= panel) {
    const int64_t live = std::min(panel, N - n);
    Ahead ahead;
    ahead.set_lines(2);
    if (n > 0) ahead.add(weight + (n - panel) * D, panel * D * int64_t(sizeof(T)));
    if (n == 0 && next) ahead_of<T>(*next, ahead);
    const A* w = widen_panel(weight + n * D, space.weight.get(), live * D);
    thin_product<Isa, A>(w, D, 1, cols, 2 * Q, live, D, Q, back + n * Q, Q, false, ahead);
  }
  const double slope = 2 * change / base_or_tiny;  // d spectral / d (||What||^2 - ||W||^2)
  const A scale = A(2 * inverse_norm2);
  std::vector<A> share(Q, A(0));  // of v W^T in the gradient of u, and of u W in that of v
  for (int64_t r = 0; r < R; ++r) {
    share[r] = A(2 * slope * double(layer.s[r]));
    layer.ds[r] = A(0);
    layer.ds[layer.P + r] = A(slope * moved[r] + drift_slope[r]);
  }
  A* mix = space.mix.get();
  for (int factor = 0; factor < 2; ++factor) {
    const double *own = factor == 0 ? gram_u : gram_v, *other = factor == 0 ? gram_v : gram_u;
    std::fill_n(mix, R * 2 * Q, A(0));
    for (int64_t i = 0; i < R; ++i)
      for (int64_t j = 0; j < R; ++j) {
        const double a = own[i * Q + j];
        mix[i * 2 * Q + j] = A(member[i] == member[j] ? 4 * (a - (i == j)) : 2 * a);
        mix[i * 2 * Q + Q + j] = A(2 * slope * double(layer.s[i]) * double(layer.s[j]) * other[i * Q + j]);
      }
    if (factor == 0)
      factor_gradients<Isa, A>(rows, 2 * Q, back, Q, scale, rows + Q, 2 * Q, share.data(), mix, N, R, Q,
                               space.block.get(), layer.du, layer.P);
    else
      factor_gradients<Isa, A>(vt, Q, cols + Q, 2 * Q, scale, cols, 2 * Q, share.data(), mix, D, R, Q,
                               space.block.get(), layer.dv, layer.P);
  }
}

template <class T, class A>
void penalize_base(Layer<A>& layer, const Layer<A>* next, Workspace<A>& space) {
  penalize<Base, T, A>(layer, next, space);
}
#if MASM_TARGETS
template <class T, class A>
MASM_TARGET_V3 void penalize_v3(Layer<A>& layer, const Layer<A>* next, Workspace<A>& space) {
  penalize<V3, T, A>(layer, next, space);
}
template <class T, class A>
MASM_TARGET_V4 void penalize_v4(Layer<A>& layer, const Layer<A>* next, Workspace<A>& space) {
  penalize<V4, T, A>(layer, next, space);
}
#endif

template <class T, class A>
void penalize_any(Layer<A>& layer, const Layer<A>* next, Workspace<A>& space) {
  switch (instruction_set()) {
#if MASM_TARGETS
    case InstructionSet::v4:
      return penalize_v4<T, A>(layer, next, space);
    case InstructionSet::v3:
      return penalize_v3<T, A>(layer, next, space);
#endif
    default:
      return penalize_base<T, A>(layer, next, space);
  }
}

void check_lists(const std::vector<Tensor>& weights, const std::vector<Tensor>& u, const std::vector<Tensor>& s,
                 const std::vector<Tensor>& v, const std::vector<Tensor>& s0, const std::vector<Tensor>& norm2,
                 const std::vector<int64_t>& offsets, const std::vector<int64_t>& subspaces) {
  const size_t L = weights.size();
  STD_TORCH_CHECK(L > 0, "masm::subspace_penalty: expected at least one layer, got none");
  STD_TORCH_CHECK(
      u.size() == L && s.size() == L && v.size() == L && s0.size() == L && norm2.size() == L && subspaces.size() == L,
      "masm::subspace_penalty: weights, u, s, v, s0, weight_norm2 and subspaces must have one length, got ", L, ", ",
      u.size(), ", ", s.size(), ", ", v.size(), ", ", s0.size(), ", ", norm2.size(), ", ", subspaces.size());
  size_t next = 0;
  for (size_t i = 0; i < L; ++i) {
    const std::string name = "subspace_penalty: layer " + std::to_string(i);
    const char* op = name.c_str();
    check_factors(op, weights[i], u[i], s[i], v[i]);
    STD_TORCH_CHECK(weights[i].is_cpu(), "masm::", op, ": the weight must be on the CPU");
    STD_TORCH_CHECK(u[i].scalar_type() == u[0].scalar_type(), "masm::", op,
                    ": u, s and v must have the dtype of those of layer 0");
    STD_TORCH_CHECK(s0[i].dim() == 1 && s0[i].size(0) == s[i].size(0), "masm::", op, ": expected s0 of shape [R] = [",
                    s[i].size(0), "], got ", shape_of(s0[i]));
    STD_TORCH_CHECK(norm2[i].numel() == 1, "masm::", op, ": weight_norm2 must have one element, got shape ",
                    shape_of(norm2[i]));
    STD_TORCH_CHECK(s0[i].scalar_type() == s[i].scalar_type() && norm2[i].scalar_type() == s[i].scalar_type() &&
                        s0[i].is_cpu() && norm2[i].is_cpu(),
                    "masm::", op, ": s0 and weight_norm2 must have the dtype and device of s");
    const int64_t K = subspaces[i];
    STD_TORCH_CHECK(K >= 1 && next + size_t(K) + 1 <= offsets.size(), "masm::", op, ": K = ", K, ", but ",
                    offsets.size() - next, " of the ", offsets.size(), " offsets are left");
    check_offsets(op, std::vector<int64_t>(offsets.begin() + next, offsets.begin() + next + K + 1), s[i].size(0));
    next += size_t(K) + 1;
  }
  STD_TORCH_CHECK(next == offsets.size(), "masm::subspace_penalty: expected ", next, " offsets, K + 1 a layer, got ",
                  offsets.size());
}

std::tuple<Tensor, Tensor, Tensor> subspace_penalty(std::vector<Tensor> weights, std::vector<Tensor> u,
                                                    std::vector<Tensor> s, std::vector<Tensor> v,
                                                    std::vector<Tensor> s0, std::vector<Tensor> weight_norm2,
                                                    std::vector<int64_t> offsets, std::vector<int64_t> subspaces,
                                                    bool need_gradients) {
  check_lists(weights, u, s, v, s0, weight_norm2, offsets, subspaces);
  const int64_t L = int64_t(weights.size());
  const auto acc = accumulate_type(u[0].scalar_type());
  int64_t P = 0;
  for (int64_t i = 0; i < L; ++i) {
    weights[i] = torch::stable::contiguous(weights[i]);
    for (auto* list : {&u, &s, &v, &s0, &weight_norm2}) (*list)[i] = as_type((*list)[i], acc);
    if (need_gradients) P += u[i].numel() + v[i].numel() + s[i].numel();
  }
  Tensor orthogonality = torch::stable::new_empty(u[0], {}, acc), spectral = torch::stable::new_empty(u[0], {}, acc);
  Tensor gradients = torch::stable::new_empty(u[0], {2, P}, acc);
  // The largest layers first, each taken by the next free thread.
  std::vector<int64_t> order(L);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return weights[a].numel() * s[a].numel() > weights[b].numel() * s[b].numel();
  });
  dispatch(acc, [&](auto, auto accumulate) {
    using A = decltype(accumulate);
    std::vector<Layer<A>> layers(L);
    A* out[3];  // where the gradients of the next layer's u, v and s go
    out[0] = static_cast<A*>(gradients.mutable_data_ptr()), out[1] = out[0], out[2] = out[0];
    for (int64_t i = 0; i < L; ++i) out[1] += u[i].numel(), out[2] += u[i].numel() + v[i].numel();
    int64_t next = 0;
    int64_t most_N = 0, most_D = 0, most_R = 0, most_panel = 0;
    for (int64_t i = 0; i < L; ++i) {
      Layer<A>& layer = layers[i];
      layer.weight = weights[i].const_data_ptr();
      layer.u = static_cast<const A*>(u[i].const_data_ptr()), layer.s = static_cast<const A*>(s[i].const_data_ptr());
      layer.v = static_cast<const A*>(v[i].const_data_ptr()), layer.s0 = static_cast<const A*>(s0[i].const_data_ptr());
      layer.weight_norm2 = double(*static_cast<const A*>(weight_norm2[i].const_data_ptr()));
      layer.offsets = offsets.data() + next, layer.K = subspaces[i], next += subspaces[i] + 1;
      layer.N = weights[i].size(0), layer.D = weights[i].size(1), layer.R = s[i].size(0), layer.P = P;
      layer.du = layer.dv = layer.ds = nullptr;
      if (need_gradients) layer.du = out[0], layer.dv = out[1], layer.ds = out[2];
      out[0] += u[i].numel(), out[1] += v[i].numel(), out[2] += s[i].numel();
      most_N = std::max(most_N, layer.N), most_D = std::max(most_D, layer.D), most_R = std::max(most_R, layer.R);
      if (is_half(weights[i].scalar_type())) most_panel = std::max(most_panel, panel_rows(layer.N, layer.D) * layer.D);
    }
    std::atomic<int64_t> taken{0};
    const int64_t threads = std::min<int64_t>(L, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      if (begin == end) return;
      Workspace<A> space(most_N, most_D, most_R, most_panel);
      for (int64_t i = taken++, then; i < L; i = then) {
        then = taken++;  // already now, so that the layer after this one can be asked for
        Layer<A>& layer = layers[order[i]];
        const Layer<A>* next = then < L ? &layers[order[then]] : nullptr;
        if constexpr (std::is_same_v<A, double>) {
          penalize_any<double, double>(layer, next, space);
        } else {
          switch (weights[order[i]].scalar_type()) {
            case ScalarType::Float:
              penalize_any<float, float>(layer, next, space);
              break;
            case ScalarType::BFloat16:
              penalize_any<BF16, float>(layer, next, space);
              break;
            default:
              penalize_any<FP16, float>(layer, next, space);
          }
        }
      }
    });
    double total[2] = {};
    for (const Layer<A>& layer : layers) total[0] += layer.orthogonality, total[1] += layer.spectral;
    *static_cast<A*>(orthogonality.mutable_data_ptr()) = A(total[0]);
    *static_cast<A*>(spectral.mutable_data_ptr()) = A(total[1]);
  });
  return {orthogonality, spectral, gradients};
}

}  // namespace
}  // namespace masm::cpu

STABLE_TORCH_LIBRARY_IMPL(masm, CPU, m) { m.impl("subspace_penalty", TORCH_BOX(&masm::cpu::subspace_penalty)); }
