// The schema of masm::update_masks_. Formulas: masm_ext/reference/update_masks.py.
// Python half (fake, public function): masm_ext/ops/update_masks.py; called by masm_ext/masks/state.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(masm, m) {
  // L layers, K subspaces, a ring of H selections.
  // sums float64 [2, L, K] = (signal, power), counts int64 [2, L, K] = (idle, probing),
  // masks float32 [2, L, K] = (selected, in force), live bool [L, K], counters int64 [2] = (steps, selections),
  // history float64 [H, L, K, 4] = (mask, snr, signal, power), history_steps int64 [H],
  // stats float64 [B, 2] and found float32 [1] as masked_adamw_ returns them, owned bool [L, K].
  m.def(
      "update_masks_(Tensor(a!) sums, Tensor(b!) counts, Tensor(c!) masks, Tensor(d!) live, Tensor(e!) counters, "
      "Tensor(f!) history, Tensor(g!) history_steps, Tensor stats, Tensor found, Tensor owned, float decay, "
      "int warmup, int interval, float hysteresis, int keep, float threshold, int least, int probe_interval, "
      "int probe_steps, bool select) -> ()");
}
