// The schema of masm::masked_adamw_. Formulas: masm_ext/reference/masked_adamw.py.
// Python half (fake, public function): masm_ext/ops/masked_adamw.py; the optimizer over it:
// masm_ext/optim/masked_adamw.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(masm, m) {
  // T tensors, B blocks, S segments (a segment is a contiguous run of one tensor that belongs to one block).
  // penalties: T gradients of decoupled penalties, empty for a parameter without one; or an empty list.
  // steps int64 [B], mask float32 [B], segments int64 [S, 4] = (tensor, begin, end, block),
  // hyper float64 [T, 5] = (lr, beta1, beta2, eps, weight_decay), grad_scale and found_inf float32 [1]
  // -> stats float64 [B, 2] = (signal, power), found float32 [1] = 1 if a gradient was not finite, on CUDA also 2 if
  // segments or mask are invalid (the CPU raises an error).
  m.def(
      "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor[] penalties, Tensor(d!) steps, Tensor mask, Tensor segments, Tensor hyper, Tensor? grad_scale, "
      "Tensor? found_inf) -> (Tensor stats, Tensor found)");
}
