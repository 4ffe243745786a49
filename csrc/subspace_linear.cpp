// The schema of masm::subspace_linear and its backward. Formulas: masm_ext/reference/subspace_linear.py.
// Python half (fake, autograd, public function): masm_ext/ops/subspace_linear.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(masm, m) {
  // x [..., D], weight [N, D], u [R, N], s [R], v [R, D], bias [N], mask bool [K] -> y [..., N], p = x v^T [..., R]
  // The mask affects y in rounding only; backward skips the masked blocks. If every subspace is masked, p is not read
  // and may be zeros; without need_p it has no columns. strategy: how the
  // product is computed, by name; empty: the table in masm_ext/ops/strategies.py chooses.
  m.def(
      "subspace_linear(Tensor x, Tensor weight, Tensor u, Tensor s, Tensor v, Tensor? bias, Tensor? mask, "
      "int[] offsets, bool need_p=True, str strategy=\"\") -> (Tensor y, Tensor p)");
  // A gradient that is not needed comes back with zero elements; rows of masked blocks come back as zeros.
  m.def(
      "subspace_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor u, Tensor s, Tensor v, Tensor p, "
      "Tensor? mask, int[] offsets, bool need_dx, bool need_du, bool need_ds, bool need_dv, bool need_dbias, "
      "str strategy=\"\") -> (Tensor dx, Tensor du, Tensor ds, Tensor dv, Tensor dbias)");
  // J layers of one shape that read the same x, as one call: x [..., D], weight J x [N, D], u J x [R, N], s J x [R],
  // v J x [R, D], bias J x [N] or none, mask bool J x [K] or none, the same offsets for all
  // -> y J x [..., N], p [..., J R]. (No defaults: the dispatcher drops arguments that equal theirs, and autograd would
  // see fewer.)
  m.def(
      "subspace_linear_group(Tensor x, Tensor[] weight, Tensor[] u, Tensor[] s, Tensor[] v, Tensor[] bias, "
      "Tensor[] mask, int[] offsets, bool need_p, str strategy) -> (Tensor[] y, Tensor p)");
  // dy J x [..., N]. -> dx [..., D], du [J R, N], ds [J R], dv [J R, D], dbias [J N].
  m.def(
      "subspace_linear_group_backward(Tensor[] dy, Tensor x, Tensor[] weight, Tensor[] u, Tensor[] s, Tensor[] v, "
      "Tensor p, Tensor[] mask, int[] offsets, bool need_dx, bool need_du, bool need_ds, bool need_dv, "
      "bool need_dbias, str strategy) -> (Tensor dx, Tensor du, Tensor ds, Tensor dv, Tensor dbias)");
}
