// masm::subspace_linear on the CPU: MKL or oneDNN computes the dense product, the kernels of skinny.h the low-rank
// path, with sums in float32 (float64 for float64) that are added before y is rounded.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../contract.h"
#include "dense.h"
#include "fold.h"
#include "rows.h"

namespace masm::cpu {
namespace {

// Tasks of about 512 rows. The backward pass adds partial sums in task order, so results do not depend on the number of
// threads. If the sums, `sum_bytes` a task, would take more than 64 MiB, there are fewer tasks, but at least 8.
struct Tasks {
  int64_t M, count, rows;

  explicit Tasks(int64_t M, int64_t sum_bytes = 0) : M(M) {
    constexpr int64_t kRows = 512, kStep = 8, kSums = 64 << 20;
    const int64_t most = std::clamp(kSums / std::max<int64_t>(sum_bytes, 1), int64_t{8}, int64_t{64});
    count = std::clamp((M + kRows - 1) / kRows, int64_t{1}, most);
    if (count > 1) count += count % 2;
    rows = std::max<int64_t>(kStep, ((M + count - 1) / count + kStep - 1) / kStep * kStep);
    count = (M + rows - 1) / rows;
  }
  int64_t begin(int64_t task) const { return std::min(M, task * rows); }
};

std::vector<int64_t> shape_with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) shape.push_back(t.size(i));
  shape.push_back(last);
  return shape;
}

// Rows of u, s, v whose gradient is needed: those of the unmasked subspaces.
std::vector<int64_t> live_rows(std::optional<Tensor> mask, const std::vector<int64_t>& offsets) {
  const size_t K = offsets.size() - 1;
  if (mask) mask = torch::stable::contiguous(*mask);
  const bool* values = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  std::vector<int64_t> live;
  for (size_t k = 0; k < K; ++k)
    for (int64_t r = offsets[k]; (!values || values[k]) && r < offsets[k + 1]; ++r) live.push_back(r);
  return live;
}

template <class A>
const A* data(const Tensor& t) {
  return static_cast<const A*>(t.const_data_ptr());
}
template <class A>
A* mutable_data(Tensor& t) {
  return static_cast<A*>(t.mutable_data_ptr());
}

// out[i, j] = c[i, columns[j]] * s[columns[j]]
template <class A>
void scale_columns(const A* c, int64_t rows, int64_t R, const A* s, const std::vector<int64_t>& columns, A* out) {
  if (int64_t(columns.size()) == R) {
    for (int64_t i = 0; i < rows; ++i, c += R, out += R)
      for (int64_t r = 0; r < R; ++r) out[r] = c[r] * s[r];
  } else {
    for (int64_t i = 0; i < rows; ++i, c += R)
      for (const int64_t r : columns) *out++ = c[r] * s[r];
  }
}

std::vector<int64_t> all_rows(int64_t R) {
  std::vector<int64_t> rows(R);
  std::iota(rows.begin(), rows.end(), int64_t{0});
  return rows;
}

// If every subspace is masked, nothing learns, and a folded weight serves x or dY at the cost of a dense layer. Fold if
// that is cheaper than the two skinny passes. Never in half precision: rounding the folded weight would lose what the
// subspaces have learned.
bool folds(ScalarType type, int64_t M, int64_t N, int64_t D) { return !is_half(type) && M * (N + D) >= 2 * N * D; }

// In float and double the low-rank part is written first, and the dense product is added in one pass over y (or dX). In
// half precision the dense product is first: adding to it costs less than the library's own accumulation.
bool dense_goes_first(ScalarType type) { return is_half(type); }

// y = (accumulate ? y : 0) + x w
void dense(const Tensor& x, const Tensor& w, Tensor& y, bool accumulate) {
  if (w.numel() > 0)
    accumulate ? add_mm_out(y, x, w, y) : mm_out(x, w, y);
  else if (!accumulate)
    torch::stable::zero_(y);
}

void check_strategy(const char* op, const std::string& strategy) {
  MASM_REQUIRE(strategy.empty(), "masm::", op, ": strategy '", strategy,
               "' is one of CUDA's; on the CPU there is none to choose, leave it out");
}

std::tuple<Tensor, Tensor> subspace_linear(const Tensor& x, const Tensor& weight, const Tensor& u, const Tensor& s,
                                           const Tensor& v, std::optional<Tensor> bias, std::optional<Tensor> mask,
                                           std::vector<int64_t> offsets, bool need_p, std::string strategy) {
  check_strategy("subspace_linear", strategy);
  check_factors("subspace_linear", weight, u, s, v);
  const int64_t N = weight.size(0), D = weight.size(1), R = s.size(0);
  check_rows("subspace_linear", "x", x, D, weight);
  check_offsets("subspace_linear", offsets, R);
  check_mask("subspace_linear", mask, offsets, weight);
  check_bias("subspace_linear", bias, weight);
  const bool masked = live_rows(mask, offsets).empty();
  const auto acc = accumulate_type(weight.scalar_type());
  Tensor y = torch::stable::new_empty(x, shape_with_last(x, N));
  Tensor p = torch::stable::new_empty(x, shape_with_last(x, need_p ? R : 0), acc);
  const Tensor x2 = as_rows(x);
  const int64_t M = x2.size(0);
  if (M == 0) return {y, p};
  Tensor y2 = torch::stable::view(y, {M, N});
  if (masked && folds(weight.scalar_type(), M, N, D)) {
    Tensor folded = fold(weight, u, s, v), w = torch::stable::transpose(folded, 0, 1);
    if (bias)
      add_mm_out(*bias, x2, w, y2);
    else
      dense(x2, w, y2, false);
    torch::stable::zero_(p);
    return {y, p};
  }
  const Tensor weight_t = torch::stable::transpose(weight, 0, 1);
  const bool dense_first = dense_goes_first(x.scalar_type());
  if (dense_first) dense(x2, weight_t, y2, false);
  const Tensor ua = as_type(u, acc), sa = as_type(s, acc), va = as_type(v, acc);
  std::optional<Tensor> ba;
  if (bias) ba = as_type(*bias, acc);
  dispatch_rows(x.scalar_type(), [&](auto t, auto read_as, auto a, const auto& kernel) {
    using T = decltype(t);
    using S = decltype(read_as);
    using A = decltype(a);
    const Buffer<A> v_packed(kernel.packed_size(R, D)), u_packed(kernel.packed_size(R, N));
    kernel.pack_dot(data<A>(va), R, D, v_packed.get());
    kernel.pack_add(data<A>(ua), R, N, u_packed.get());
    const std::vector<int64_t> every = all_rows(R);
    const int64_t step = block_rows(std::max(N, D) * int64_t(sizeof(S)));
    torch::stable::parallel_for(0, (M + step - 1) / step, 1, [&](int64_t b0, int64_t b1) {
      const Rows<T, S> x_rows(step, D), y_rows(step, N);
      const Buffer<A> scaled(step * R), scratch(kernel.scratch_size(step, R)), unkept(need_p ? 0 : step * R);
      for (int64_t m = b0 * step; m < std::min(M, b1 * step); m += step) {
        const int64_t rows = std::min(step, M - m);
        A* p_block = need_p ? mutable_data<A>(p) + m * R : unkept.get();
        kernel.dot(x_rows.read(data<T>(x2), m, rows), rows, D, v_packed.get(), R, p_block);
        scale_columns(p_block, rows, R, data<A>(sa), every, scaled.get());
        y_rows.add(kernel, scaled.get(), R, u_packed.get(), ba ? data<A>(*ba) : nullptr, dense_first, true,
                   mutable_data<T>(y2), m, rows, scratch.get());
      }
    });
  });
  if (!dense_first) dense(x2, weight_t, y2, true);
  return {y, p};
}

// Sum of the partial sums of all tasks, in task order: row i of a partial sum is row rows[i] of the result, other rows
// are zeros.
template <class A>
Tensor reduce_tasks(const A* partial, int64_t count, const std::vector<int64_t>& rows, int64_t L, const Tensor& like,
                    const std::vector<int64_t>& shape) {
  Tensor total = torch::stable::new_empty(like, shape, accumulate_type(like.scalar_type()));
  A* out = mutable_data<A>(total);
  if (total.numel() != int64_t(rows.size()) * L) std::fill_n(out, total.numel(), A(0));
  torch::stable::parallel_for(0, int64_t(rows.size()), 4, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      A* row = out + rows[i] * L;
      std::fill_n(row, L, A(0));
      for (int64_t c = 0; c < count; ++c) {
        const A* part = partial + (c * int64_t(rows.size()) + i) * L;
        for (int64_t l = 0; l < L; ++l) row[l] += part[l];
      }
    }
  });
  return total.scalar_type() == like.scalar_type() ? total : torch::stable::to(total, like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> subspace_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& u, const Tensor& s, const Tensor& v,
    const Tensor& p, std::optional<Tensor> mask, std::vector<int64_t> offsets, bool need_dx, bool need_du, bool need_ds,
    bool need_dv, bool need_dbias, std::string strategy) {
  check_strategy("subspace_linear_backward", strategy);
  check_factors("subspace_linear_backward", weight, u, s, v);
  const int64_t N = weight.size(0), D = weight.size(1), R = s.size(0);
  const char* op = "subspace_linear_backward";
  check_rows(op, "dy", dy, N, weight);
  check_rows(op, "x", x, D, weight);
  check_shape(op, "x", x, shape_with_last(dy, D));
  check_shape(op, "p", p, shape_with_last(dy, R));
  check_dtype(op, "p", p, accumulate_type(weight.scalar_type()));
  check_device(op, "p", p, "weight", weight);
  check_offsets(op, offsets, R);
  check_mask(op, mask, offsets, weight);

  const std::vector<int64_t> live = live_rows(mask, offsets), every = all_rows(R);
  const int64_t L = int64_t(live.size());
  const Tensor dy2 = as_rows(dy);
  const int64_t M = dy2.size(0);
  const auto acc = accumulate_type(weight.scalar_type());
  const bool sum_du = need_du && L > 0, sum_ds = need_ds && L > 0, sum_dv = need_dv && L > 0;
  // An operand that no gradient reads may be a broadcast placeholder: it is not made contiguous.
  const Tensor x2 = sum_dv ? as_rows(x) : x;
  const Tensor p2 = sum_du || sum_ds ? as_rows(p) : p;
  // a separate empty tensor for each gradient that is not needed: outputs of an op must not alias
  const auto none = [&] { return torch::stable::new_empty(weight, {0}); };
  Tensor dx = need_dx ? torch::stable::new_empty(x, shape_with_last(x, D)) : none();
  Tensor dx2 = need_dx ? torch::stable::view(dx, {M, D}) : dx;
  const bool folded = L == 0 && folds(weight.scalar_type(), M, N, D),
             dense_first = dense_goes_first(weight.scalar_type());
  if (need_dx && folded) dense(dy2, fold(weight, u, s, v), dx2, false);
  const bool write_dx = need_dx && !folded && M > 0 && D > 0;
  if (write_dx && dense_first) dense(dy2, weight, dx2, false);
  const Tensor ua = as_type(u, acc), sa = as_type(s, acc), va = as_type(v, acc);
  Tensor du = none(), ds = none(), dv = none(), db = none();
  dispatch_rows(weight.scalar_type(), [&](auto t, auto read_as, auto a, const auto& kernel) {
    using T = decltype(t);
    using S = decltype(read_as);
    using A = decltype(a);
    // The partial sums of a task: du [L, N], dv [L, D], ds [L], dbias [N].
    const Tasks tasks(M, ((sum_du ? L * N : 0) + (sum_dv ? L * D : 0) + N) * int64_t(sizeof(A)));
    const auto zeros = [&](bool wanted, int64_t n) { return std::vector<A>(wanted ? tasks.count * n : 0); };
    std::vector<A> du_part = zeros(sum_du, L * N), dv_part = zeros(sum_dv, L * D), ds_part = zeros(sum_ds, L),
                   db_part = zeros(need_dbias, N);
    if (write_dx || sum_du || sum_ds || sum_dv || need_dbias) {
      const bool need_q = write_dx || sum_ds || sum_dv;
      const Buffer<A> u_packed(kernel.packed_size(R, N)), v_packed(kernel.packed_size(R, D));
      if (need_q) kernel.pack_dot(data<A>(ua), R, N, u_packed.get());
      if (write_dx) kernel.pack_add(data<A>(va), R, D, v_packed.get());
      const A* s_data = data<A>(sa);
      const int64_t step = block_rows(std::max(N, D) * int64_t(sizeof(S)));
      torch::stable::parallel_for(0, tasks.count, 1, [&](int64_t c0, int64_t c1) {
        const Rows<T, S> dy_rows(step, N), x_rows(step, D);
        const Buffer<A> q(step * R), scaled(step * R), ones(step),
            scratch(kernel.scratch_size(step, std::max(R, int64_t{1})));
        std::fill_n(ones.get(), step, A(1));
        for (int64_t c = c0; c < c1; ++c) {
          const int64_t end = tasks.begin(c + 1);
          std::vector<A> ds_task(R);
          for (int64_t m = tasks.begin(c); m < end; m += step) {
            const int64_t rows = std::min(step, end - m);
            const S* dy_block = dy_rows.read(data<T>(dy2), m, rows);
            const A* p_block = sum_du || sum_ds ? data<A>(p2) + m * R : nullptr;
            if (need_dbias) kernel.outer(ones.get(), rows, 1, dy_block, N, db_part.data() + c * N, scratch.get());
            if (need_q) kernel.dot(dy_block, rows, N, u_packed.get(), R, q.get());
            if (sum_du) {
              scale_columns(p_block, rows, R, s_data, live, scaled.get());
              kernel.outer(scaled.get(), rows, L, dy_block, N, du_part.data() + c * L * N, scratch.get());
            }
            if (sum_ds)
              for (int64_t i = 0; i < rows; ++i)
                for (int64_t r = 0; r < R; ++r) ds_task[r] += p_block[i * R + r] * q.get()[i * R + r];
            if (sum_dv) {
              scale_columns(q.get(), rows, R, s_data, live, scaled.get());
              kernel.outer(scaled.get(), rows, L, x_rows.read(data<T>(x2), m, rows), D, dv_part.data() + c * L * D,
                           scratch.get());
            }
            if (write_dx) {
              scale_columns(q.get(), rows, R, s_data, every, scaled.get());
              x_rows.add(kernel, scaled.get(), R, v_packed.get(), static_cast<const A*>(nullptr), dense_first, false,
                         mutable_data<T>(dx2), m, rows, scratch.get());
            }
          }
          if (sum_ds)
            for (int64_t j = 0; j < L; ++j) ds_part[c * L + j] = ds_task[live[j]];
        }
      });
    }
    if (need_du) du = reduce_tasks(du_part.data(), tasks.count, live, N, u, {R, N});
    if (need_ds) ds = reduce_tasks(ds_part.data(), tasks.count, live, 1, s, {R});
    if (need_dv) dv = reduce_tasks(dv_part.data(), tasks.count, live, D, v, {R, D});
    if (need_dbias) db = reduce_tasks(db_part.data(), tasks.count, {0}, N, weight, {N});
  });
  if (write_dx && !dense_first) dense(dy2, weight, dx2, true);
  return {dx, du, ds, dv, db};
}

}  // namespace
}  // namespace masm::cpu

STABLE_TORCH_LIBRARY_IMPL(masm, CPU, m) {
  m.impl("subspace_linear", TORCH_BOX(&masm::cpu::subspace_linear));
  m.impl("subspace_linear_backward", TORCH_BOX(&masm::cpu::subspace_linear_backward));
}
