// masm::subspace_linear on the CPU: the dense product goes to MKL/oneDNN, the low-rank path is our own, in float32
// (float64 for float64), added before y is rounded for the last time.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "dense.h"
#include "rows.h"

namespace masm::cpu {
namespace {

// Rows a task owns. Partial sums are formed per task and added in task order, so results do not depend on the number
// of threads.
constexpr int64_t kTaskRows = 512;

int64_t tasks(int64_t M) { return (M + kTaskRows - 1) / kTaskRows; }

std::vector<int64_t> shape_with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) shape.push_back(t.size(i));
  shape.push_back(last);
  return shape;
}

void check_input(const char* op, const char* name, const Tensor& t, int64_t last, const Tensor& weight) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(-1) == last, "masm::", op, ": expected ", name, " with last dimension ", last,
                  ", got shape ", shape_of(t));
  STD_TORCH_CHECK(t.scalar_type() == weight.scalar_type(), "masm::", op, ": ", name,
                  " and weight have different dtypes; cast the input or use torch.autocast");
  STD_TORCH_CHECK(t.is_cpu() && weight.is_cpu(), "masm::", op, ": ", name, " and weight must both be on the CPU");
}

// Row ranges of u, s, v whose gradient is wanted: the subspaces that are not masked.
std::vector<std::pair<int64_t, int64_t>> live_ranges(const std::optional<Tensor>& mask,
                                                     const std::vector<int64_t>& offsets) {
  const size_t K = offsets.size() - 1;
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 1 && mask->size(0) == int64_t(K) && mask->is_contiguous() &&
                        mask->scalar_type() == ScalarType::Bool,
                    "masm::subspace_linear: expected a contiguous bool mask of shape [K] = [", K, "], got ",
                    shape_of(*mask));
  }
  const bool* values = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  std::vector<std::pair<int64_t, int64_t>> live;
  for (size_t k = 0; k < K; ++k)
    if ((!values || values[k]) && offsets[k] < offsets[k + 1]) live.emplace_back(offsets[k], offsets[k + 1]);
  return live;
}

// y[m] += (p[m] * s) u + bias, rows [m0, m1); p is written first when x is given.
template <class T, class A>
void add_low_rank(T* y, const T* x, A* p, const A* u, const A* s, const A* v, const A* bias, int64_t m0, int64_t m1,
                  int64_t N, int64_t D, int64_t R) {
  RowBlock<T, A> x_rows(D), y_rows(N);
  std::vector<A> dots(kRows * R), scaled(kRows * R);
  for (int64_t m = m0; m < m1; m += kRows) {
    skinny_dot(x_rows.load(x, m, m1), v, R, D, dots.data());
    for (int64_t i = 0; i < kRows * R; ++i) scaled[i] = dots[i] * s[i % R];
    const int64_t live = std::min<int64_t>(kRows, m1 - m);
    std::copy_n(dots.data(), live * R, p + m * R);
    A* const* rows = y_rows.load(y, m, m1);
    skinny_add(rows, scaled.data(), u, R, N);
    if (bias)
      for (int64_t i = 0; i < live; ++i)
        for (int64_t n = 0; n < N; ++n) rows[i][n] += bias[n];
    y_rows.store(y, m, m1);
  }
}

std::tuple<Tensor, Tensor> subspace_linear(const Tensor& x, const Tensor& weight, const Tensor& u, const Tensor& s,
                                           const Tensor& v, std::optional<Tensor> bias, std::optional<Tensor> mask,
                                           std::vector<int64_t> offsets) {
  check_factors("subspace_linear", weight, u, s, v);
  const int64_t N = weight.size(0), D = weight.size(1), R = s.size(0);
  check_input("subspace_linear", "x", x, D, weight);
  check_offsets("subspace_linear", offsets, R);
  live_ranges(mask, offsets);  // a wrong mask is told here, not in backward
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == weight.scalar_type() && bias->is_cpu(),
                    "masm::subspace_linear: bias must have the dtype and device of weight");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N, "masm::subspace_linear: expected bias of shape [", N,
                    "], got ", shape_of(*bias));
  }
  const auto acc = accumulate_type(weight.scalar_type());
  Tensor y = torch::stable::new_empty(x, shape_with_last(x, N));
  Tensor p = torch::stable::new_empty(x, shape_with_last(x, R), acc);
  const Tensor x2 = as_rows(x);
  const int64_t M = x2.size(0);
  if (M == 0) return {y, p};
  Tensor y2 = torch::stable::view(y, {M, N});
  if (N > 0) mm_out(x2, torch::stable::transpose(weight, 0, 1), y2);
  const Tensor ua = as_type(u, acc), sa = as_type(s, acc), va = as_type(v, acc);
  std::optional<Tensor> ba;
  if (bias) ba = as_type(*bias, acc);
  dispatch(x.scalar_type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    torch::stable::parallel_for(0, (M + kRows - 1) / kRows, 16, [&](int64_t b0, int64_t b1) {
      add_low_rank<T, A>(static_cast<T*>(y2.mutable_data_ptr()), static_cast<const T*>(x2.const_data_ptr()),
                         static_cast<A*>(p.mutable_data_ptr()), static_cast<const A*>(ua.const_data_ptr()),
                         static_cast<const A*>(sa.const_data_ptr()), static_cast<const A*>(va.const_data_ptr()),
                         ba ? static_cast<const A*>(ba->const_data_ptr()) : nullptr, b0 * kRows,
                         std::min(M, b1 * kRows), N, D, R);
    });
  });
  return {y, p};
}

// Sum over tasks, in task order, into a tensor of the wanted dtype.
template <class A>
Tensor reduce_partials(const std::vector<A>& partials, int64_t count, int64_t n, const Tensor& like,
                       const std::vector<int64_t>& shape) {
  Tensor total = torch::stable::new_empty(like, shape, accumulate_type(like.scalar_type()));
  A* out = static_cast<A*>(total.mutable_data_ptr());
  std::fill_n(out, n, A(0));
  for (int64_t c = 0; c < count; ++c)
    for (int64_t i = 0; i < n; ++i) out[i] += partials[c * n + i];
  return total.scalar_type() == like.scalar_type() ? total : torch::stable::to(total, like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> subspace_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& u, const Tensor& s, const Tensor& v,
    const Tensor& p, std::optional<Tensor> mask, std::vector<int64_t> offsets, bool need_dx, bool need_du, bool need_ds,
    bool need_dv, bool need_dbias) {
  check_factors("subspace_linear_backward", weight, u, s, v);
  const int64_t N = weight.size(0), D = weight.size(1), R = s.size(0);
  check_input("subspace_linear_backward", "dy", dy, N, weight);
  check_input("subspace_linear_backward", "x", x, D, weight);
  check_offsets("subspace_linear_backward", offsets, R);
  STD_TORCH_CHECK(p.dim() >= 1 && p.size(-1) == R && p.scalar_type() == accumulate_type(weight.scalar_type()),
                  "masm::subspace_linear_backward: p must be the second output of the forward op");

  const auto live = live_ranges(mask, offsets);
  const Tensor dy2 = as_rows(dy);
  const int64_t M = dy2.size(0);
  const auto acc = accumulate_type(weight.scalar_type());
  const bool factors = (need_du || need_ds || need_dv) && !live.empty();
  STD_TORCH_CHECK(x.numel() == M * D && p.numel() == M * R, "masm::subspace_linear_backward: x ", shape_of(x), ", p ",
                  shape_of(p), " and dy ", shape_of(dy), " disagree on the number of rows");
  // What nobody reads may be a broadcast placeholder: it is not laid out.
  const Tensor x2 = need_dv && factors ? as_rows(x) : x;
  const Tensor p2 = (need_du || need_ds) && factors ? as_rows(p) : p;
  const Tensor none = torch::stable::new_empty(weight, {0});
  Tensor dx = need_dx ? torch::stable::new_empty(x, shape_with_last(x, D)) : none;
  if (need_dx && M > 0 && D > 0) {
    Tensor dx2 = torch::stable::view(dx, {M, D});
    if (N > 0)
      mm_out(dy2, weight, dx2);
    else
      torch::stable::zero_(dx2);
  }
  const Tensor ua = as_type(u, acc), sa = as_type(s, acc), va = as_type(v, acc);
  Tensor du = none, ds = none, dv = none, db = none;
  dispatch(weight.scalar_type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const int64_t count = tasks(M);
    std::vector<A> du_part(need_du ? count * R * N : 0), ds_part(need_ds ? count * R : 0),
        dv_part(need_dv ? count * R * D : 0), db_part(need_dbias ? count * N : 0);
    const T* dy_data = static_cast<const T*>(dy2.const_data_ptr());
    const T* x_data = static_cast<const T*>(x2.const_data_ptr());
    const A* p_data = static_cast<const A*>(p2.const_data_ptr());
    const A* u_data = static_cast<const A*>(ua.const_data_ptr());
    const A* s_data = static_cast<const A*>(sa.const_data_ptr());
    const A* v_data = static_cast<const A*>(va.const_data_ptr());
    T* dx_data = need_dx ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr;
    if (need_dx || factors || need_dbias) {
      torch::stable::parallel_for(0, count, 1, [&](int64_t c0, int64_t c1) {
        RowBlock<T, A> dy_rows(N), x_rows(D), dx_rows(D);
        std::vector<A> q(kRows * R), qs(kRows * R), ps(kRows * R);
        for (int64_t c = c0; c < c1; ++c) {
          const int64_t end = std::min(M, (c + 1) * kTaskRows);
          for (int64_t m = c * kTaskRows; m < end; m += kRows) {
            A* const* dyr = dy_rows.load(dy_data, m, end);
            if (need_dbias)
              for (int i = 0; i < kRows; ++i)
                for (int64_t n = 0; n < N; ++n) db_part[c * N + n] += dyr[i][n];
            if (!need_dx && !factors) continue;
            skinny_dot(dyr, u_data, R, N, q.data());
            for (int64_t i = 0; i < kRows * R; ++i) qs[i] = q[i] * s_data[i % R];
            if (need_dx) {
              A* const* dxr = dx_rows.load(dx_data, m, end);
              skinny_add(dxr, qs.data(), v_data, R, D);
              dx_rows.store(dx_data, m, end);
            }
            if (!factors) continue;
            const int64_t rows = std::min<int64_t>(kRows, end - m);
            if (need_du || need_ds) {
              std::fill(ps.begin(), ps.end(), A(0));
              std::copy_n(p_data + m * R, rows * R, ps.data());
            }
            if (need_ds)
              for (auto [b, e] : live)
                for (int i = 0; i < kRows; ++i)
                  for (int64_t r = b; r < e; ++r) ds_part[c * R + r] += ps[i * R + r] * q[i * R + r];
            if (need_du) {
              for (int64_t i = 0; i < kRows * R; ++i) ps[i] *= s_data[i % R];
              for (auto [b, e] : live) skinny_outer(du_part.data() + c * R * N, ps.data(), dyr, b, e, R, N);
            }
            if (need_dv) {
              A* const* xr = x_rows.load(x_data, m, end);
              for (auto [b, e] : live) skinny_outer(dv_part.data() + c * R * D, qs.data(), xr, b, e, R, D);
            }
          }
        }
      });
    }
    if (need_du) du = reduce_partials<A>(du_part, count, R * N, u, {R, N});
    if (need_ds) ds = reduce_partials<A>(ds_part, count, R, s, {R});
    if (need_dv) dv = reduce_partials<A>(dv_part, count, R * D, v, {R, D});
    if (need_dbias) db = reduce_partials<A>(db_part, count, N, weight, {N});
  });
  return {dx, du, ds, dv, db};
}

}  // namespace
}  // namespace masm::cpu

STABLE_TORCH_LIBRARY_IMPL(masm, CPU, m) {
  m.impl("subspace_linear", TORCH_BOX(&masm::cpu::subspace_linear));
  m.impl("subspace_linear_backward", TORCH_BOX(&masm::cpu::subspace_linear_backward));
}
