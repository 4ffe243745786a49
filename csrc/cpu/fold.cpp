// masm::fold on the CPU: weight + u^T diag(s) v in float32 (float64 for float64), rounded once.
#include "fold.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../contract.h"
#include "dense.h"
#include "rows.h"

namespace masm::cpu {
Tensor fold(const Tensor& weight, const Tensor& u, const Tensor& s, const Tensor& v) {
  check_factors("fold", weight, u, s, v);
  const int64_t N = weight.size(0), D = weight.size(1), R = s.size(0);
  Tensor out = torch::stable::new_empty(weight, {N, D});
  if (N == 0 || D == 0) return out;
  const Tensor w = torch::stable::contiguous(weight);
  const auto acc = accumulate_type(weight.scalar_type());
  const Tensor ua = as_type(u, acc), sa = as_type(s, acc), va = as_type(v, acc);
  dispatch_rows(weight.scalar_type(), [&](auto t, auto, auto a, const auto&) {
    using T = decltype(t);
    using A = decltype(a);
    const auto& kernel = kernels_of<A>();  // bfloat16 too is summed as float and rounded once
    constexpr int64_t step = 24;
    const A *u_data = static_cast<const A*>(ua.const_data_ptr()), *s_data = static_cast<const A*>(sa.const_data_ptr());
    const Buffer<A> packed(kernel.packed_size(R, D));
    kernel.pack_add(static_cast<const A*>(va.const_data_ptr()), R, D, packed.get());
    const T* w_data = static_cast<const T*>(w.const_data_ptr());
    T* out_data = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, (N + step - 1) / step, 1, [&](int64_t b0, int64_t b1) {
      const Rows<T, A> rows_of(step, D);
      const Buffer<A> c(step * R), scratch(kernel.scratch_size(step, R));
      for (int64_t n = b0 * step; n < std::min(N, b1 * step); n += step) {
        const int64_t rows = std::min(step, N - n);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t r = 0; r < R; ++r) c.get()[i * R + r] = u_data[r * N + n + i] * s_data[r];
        std::copy_n(w_data + n * D, rows * D, out_data + n * D);
        rows_of.add(kernel, c.get(), R, packed.get(), static_cast<const A*>(nullptr), true, false, out_data, n, rows,
                    scratch.get());
      }
    });
  });
  return out;
}

}  // namespace masm::cpu

STABLE_TORCH_LIBRARY_IMPL(masm, CPU, m) { m.impl("fold", TORCH_BOX(&masm::cpu::fold)); }
