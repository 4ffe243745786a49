// The schema of masm::subspace_penalty. Formulas: masm_ext/reference/subspace_penalty.py.
// Python half (fake, autograd, public function): masm_ext/ops/subspace_penalty.py; the losses over it:
// masm_ext/losses.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(masm, m) {
  // Lists over L layers: weights [N, D], u [R, N], s [R], v [R, D], s0 [R], weight_norm2 one element; subspaces int [L]
  // holds K of every layer, offsets the K + 1 row bounds of every layer, one layer after the other.
  // -> orthogonality and spectral, both [], sums over the layers, and gradients [2, P]: row 0 of orthogonality, row 1
  // of spectral, each every u, then every v, then every s, flat ([2, 0] if they are not needed).
  m.def(
      "subspace_penalty(Tensor[] weights, Tensor[] u, Tensor[] s, Tensor[] v, Tensor[] s0, Tensor[] weight_norm2, "
      "int[] offsets, int[] subspaces, bool need_gradients) -> (Tensor orthogonality, Tensor spectral, "
      "Tensor gradients)");
}
