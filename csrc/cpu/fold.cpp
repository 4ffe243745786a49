// masm::fold on the CPU: weight + u^T diag(s) v in float32 (float64 for float64), rounded once.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "dense.h"
#include "rows.h"

namespace masm::cpu {
namespace {

Tensor fold(const Tensor& weight, const Tensor& u, const Tensor& s, const Tensor& v) {
  check_factors("fold", weight, u, s, v);
  const int64_t N = weight.size(0), D = weight.size(1), R = s.size(0);
  Tensor out = torch::stable::new_empty(weight, {N, D});
  if (N == 0 || D == 0) return out;
  const Tensor w = torch::stable::contiguous(weight);
  const auto acc = accumulate_type(weight.scalar_type());
  const Tensor ua = as_type(u, acc), sa = as_type(s, acc), va = as_type(v, acc);
  dispatch(weight.scalar_type(), [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const T* w_data = static_cast<const T*>(w.const_data_ptr());
    const A* u_data = static_cast<const A*>(ua.const_data_ptr());
    const A* s_data = static_cast<const A*>(sa.const_data_ptr());
    const A* v_data = static_cast<const A*>(va.const_data_ptr());
    T* out_data = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, (N + kRows - 1) / kRows, 8, [&](int64_t b0, int64_t b1) {
      std::vector<A> rows(kRows * D), c(kRows * R);
      A* pointers[kRows];
      for (int i = 0; i < kRows; ++i) pointers[i] = rows.data() + i * D;
      for (int64_t n0 = b0 * kRows; n0 < std::min(N, b1 * kRows); n0 += kRows) {
        const int64_t live = std::min<int64_t>(kRows, N - n0);
        for (int64_t i = 0; i < live; ++i) widen(w_data + (n0 + i) * D, pointers[i], D);
        std::fill(c.begin(), c.end(), A(0));
        for (int64_t i = 0; i < live; ++i)
          for (int64_t r = 0; r < R; ++r) c[i * R + r] = u_data[r * N + n0 + i] * s_data[r];
        skinny_add(pointers, c.data(), v_data, R, D);
        for (int64_t i = 0; i < live; ++i) narrow(pointers[i], out_data + (n0 + i) * D, D);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace masm::cpu

STABLE_TORCH_LIBRARY_IMPL(masm, CPU, m) { m.impl("fold", TORCH_BOX(&masm::cpu::fold)); }
