// masm::update_masks_ on the CPU: a few hundred blocks, on one thread.
#include "../update_masks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace masm::cpu {
namespace {

void choose(const MaskPolicy& p, const MaskTable& t, int64_t selection) {
  const int64_t winners = p.keep > 0 ? p.keep : p.least;
  std::vector<int64_t> order(t.L);
  for (int64_t k = 0; k < t.K; ++k) {
    const auto score = [&](int64_t layer) { return score_of(t, selection, layer * t.K + k); };
    std::iota(order.begin(), order.end(), int64_t(0));
    // layers beaten by fewer than `winners` come first; the order within either side does not matter
    std::nth_element(order.begin(), order.begin() + winners, order.end(),
                     [&](int64_t a, int64_t b) { return beats(score(a), a, score(b), b); });
    for (int64_t i = 0; i < t.L; ++i) t.selected[order[i] * t.K + k] = chosen(p, score(order[i]), i) ? 1.f : 0.f;
  }
}

void update_masks_(const Tensor& sums, const Tensor& counts, const Tensor& masks, const Tensor& live,
                   const Tensor& counters, const Tensor& history, const Tensor& history_steps, const Tensor& stats,
                   const Tensor& found, const Tensor& owned, double decay, int64_t warmup, int64_t interval,
                   double hysteresis, int64_t keep, double threshold, int64_t least, int64_t probe_interval,
                   int64_t probe_steps, bool select) {
  const MaskPolicy p{decay, warmup, interval, hysteresis, keep, threshold, least, probe_interval, probe_steps, select};
  const MaskTable t = mask_table(sums, counts, masks, live, counters, history, history_steps, stats, found, owned, p);
  if (*t.found != 0) return;
  const int64_t n = t.blocks(), step = ++*t.step, selection = *t.selections;
  for (int64_t b = 0; b < n; ++b) observe_block(p, t, b);
  if (selection_due(p, step)) {
    for (int64_t b = 0; b < n; ++b) record_block(p, t, selection, b);
    choose(p, t, selection);
    for (int64_t b = 0; b < n; ++b) record_mask(t, selection, b);
    t.history_steps[selection % t.rows] = step;
    ++*t.selections;
  }
  for (int64_t b = 0; b < n; ++b) settle_block(p, t, b);
}

}  // namespace
}  // namespace masm::cpu

STABLE_TORCH_LIBRARY_IMPL(masm, CPU, m) { m.impl("update_masks_", TORCH_BOX(&masm::cpu::update_masks_)); }
