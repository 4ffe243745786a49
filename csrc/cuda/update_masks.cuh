// The kernel of masm::update_masks_.
#pragma once
#include "../math/update_masks.h"
#include "device.cuh"

namespace masm::cuda {

constexpr int kMaskThreads = 512;

// One thread block; a thread for each of a few hundred (layer, subspace) blocks. A selection ranks the scores in its
// history record, so no memory here depends on the number of layers.
__global__ void __launch_bounds__(kMaskThreads) update_masks_kernel(MaskTable t, MaskPolicy p) {
  if (*t.found != 0) return;
  const int64_t n = t.blocks(), step = *t.step + 1, selection = *t.selections;
  const bool due = selection_due(p, step);
  for (int64_t b = threadIdx.x; b < n; b += blockDim.x) {
    observe_block(p, t, b);
    if (due) record_block(p, t, selection, b);
  }
  __syncthreads();  // all records are written; every thread has read the counters
  if (due) {
    for (int64_t b = threadIdx.x; b < n; b += blockDim.x) {
      const int64_t layer = b / t.K, k = b % t.K;
      const double score = score_of(t, selection, b);
      int64_t rank = 0;
      for (int64_t l = 0; l < t.L; ++l) rank += beats(score_of(t, selection, l * t.K + k), l, score, layer);
      t.selected[b] = chosen(p, score, rank) ? 1.f : 0.f;
    }
    __syncthreads();  // no thread reads the scores any more
    for (int64_t b = threadIdx.x; b < n; b += blockDim.x) record_mask(t, selection, b);
  }
  for (int64_t b = threadIdx.x; b < n; b += blockDim.x) settle_block(p, t, b);
  if (threadIdx.x == 0) {
    *t.step = step;
    if (due) {
      t.history_steps[selection % t.rows] = step;
      *t.selections = selection + 1;
    }
  }
}

}  // namespace masm::cuda
