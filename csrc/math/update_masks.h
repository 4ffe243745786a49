// The learning state and mask of one block (layer l, subspace k), shared by the CPU and CUDA kernels.
// Formulas: masm_ext/reference/update_masks.py. A block's index is l * K + k.
#pragma once
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace masm {

struct MaskPolicy {
  double decay;  // of the statistics
  int64_t warmup, interval;
  double hysteresis;
  int64_t keep;  // layers that each subspace keeps; 0: those above the threshold
  double threshold;
  int64_t least, probe_interval, probe_steps;
  bool select;
};

// The operands of masm::update_masks_, contiguous.
struct MaskTable {
  int64_t L, K, rows;
  double *signal, *power;      // [L * K] each
  int64_t *idle, *probing;     // [L * K] each
  float *selected, *in_force;  // [L * K] each
  bool* live;                  // [L * K]
  int64_t *step, *selections;  // one each
  double* history;             // [rows, L * K, 4] = (mask, snr, signal, power)
  int64_t* history_steps;      // [rows]
  const double* stats;         // [L * K or more, 2]
  const float* found;          // one
  const bool* owned;           // [L * K]

  MASM_HOST_DEVICE int64_t blocks() const { return L * K; }
  // The record of block b in the selection of this step: in the oldest row of the ring.
  MASM_HOST_DEVICE double* record(int64_t selection, int64_t b) const {
    return history + (selection % rows * blocks() + b) * 4;
  }
};

MASM_HOST_DEVICE inline bool selection_due(const MaskPolicy& p, int64_t step) {
  return p.select && step >= p.warmup && (step - p.warmup) % p.interval == 0;
}

// Adds the sums of a step that updated the block to its averages.
MASM_HOST_DEVICE inline void observe_block(const MaskPolicy& p, const MaskTable& t, int64_t b) {
  if (!t.owned[b] || t.in_force[b] == 0) return;
  t.signal[b] = p.decay * t.signal[b] + (1 - p.decay) * t.stats[2 * b];
  t.power[b] = p.decay * t.power[b] + (1 - p.decay) * t.stats[2 * b + 1];
}

// A block's record, with its score in place of the mask while layers are ranked. A block that is already selected has
// an advantage, also with a negative snr.
MASM_HOST_DEVICE inline void record_block(const MaskPolicy& p, const MaskTable& t, int64_t selection, int64_t b) {
  const double ratio = t.signal[b] / t.power[b];
  const double snr = std::isfinite(ratio) ? ratio : 0;  // no step yet, or sums that overflowed
  double* record = t.record(selection, b);
  record[0] = t.selected[b] > 0 ? snr + p.hysteresis * std::fabs(snr) : snr;
  record[1] = snr;
  record[2] = t.signal[b];
  record[3] = t.power[b];
}

MASM_HOST_DEVICE inline double score_of(const MaskTable& t, int64_t selection, int64_t b) {
  return t.record(selection, b)[0];
}

MASM_HOST_DEVICE inline void record_mask(const MaskTable& t, int64_t selection, int64_t b) {
  t.record(selection, b)[0] = t.selected[b];
}

// Between equal scores the earlier layer wins.
MASM_HOST_DEVICE inline bool beats(double a, int64_t layer_a, double b, int64_t layer_b) {
  return a > b || (a == b && layer_a < layer_b);
}

// rank: the number of layers of its subspace with a better score.
MASM_HOST_DEVICE inline bool chosen(const MaskPolicy& p, double score, int64_t rank) {
  return p.keep > 0 ? rank < p.keep : rank < p.least || score > p.threshold;
}

// Advances the probe of a masked block and sets the mask in force.
MASM_HOST_DEVICE inline void settle_block(const MaskPolicy& p, const MaskTable& t, int64_t b) {
  const bool masked = t.selected[b] == 0;
  int64_t probing = masked && t.probing[b] > 0 ? t.probing[b] - 1 : 0;
  const bool resting = masked && probing == 0;
  const bool probe = resting && p.probe_interval > 0 && t.idle[b] >= p.probe_interval;
  if (probe) probing = p.probe_steps;
  t.probing[b] = probing;
  t.idle[b] = resting && !probe ? t.idle[b] + 1 : 0;
  t.in_force[b] = probing > 0 ? 1 : t.selected[b];
  t.live[b] = t.in_force[b] != 0;
}

}  // namespace masm
