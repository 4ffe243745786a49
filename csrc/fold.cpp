// The schema of masm::fold. Formula: masm_ext/reference/fold.py. Python half: masm_ext/ops/fold.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(masm, m) {
  // weight [N, D], u [R, N], s [R], v [R, D] -> weight + u^T diag(s) v, rounded once to weight's dtype.
  m.def("fold(Tensor weight, Tensor u, Tensor s, Tensor v) -> Tensor");
}
