// The dense product and the layout of matrices, shared by the CPU ops.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>

namespace masm::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// out = a b through the dispatcher (MKL, oneDNN). mm.out has no autocast and no autograd rule, so neither changes the
// computation.
inline void mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  namespace d = torch::stable::detail;
  std::array<StableIValue, 3> stack{d::from(a), d::from(b), d::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  d::to<Tensor>(stack[0]);  // takes ownership of the returned handle
}

// out = c + a b, c [n] or out itself. Calls the CPU kernel through PyTorch's C shim: the stable ABI cannot pass a
// Scalar to the dispatcher.
inline void add_mm_out(const Tensor& c, const Tensor& a, const Tensor& b, Tensor& out) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), c.get(), a.get(), b.get(), 1.0, 1.0));
}

// [..., n] -> contiguous [M, n]; copies only if the strides require it.
inline Tensor as_rows(const Tensor& t) {
  const int64_t n = t.size(-1);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) M *= t.size(i);
  return torch::stable::contiguous(torch::stable::reshape(t, {M, n}));
}

// Contiguous, in the type of the low-rank path.
inline Tensor as_type(const Tensor& t, ScalarType type) {
  return torch::stable::contiguous(t.scalar_type() == type ? t : torch::stable::to(t, type));
}

}  // namespace masm::cpu
