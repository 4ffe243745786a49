#include "update_masks.cuh"

#include "entry.h"

// The operands of masm::update_masks_ in its order, and the sizes.
extern "C" const char* update_masks(double* sums, int64_t* counts, float* masks, bool* live, int64_t* counters,
                                    double* history, int64_t* history_steps, const double* stats, const float* found,
                                    const bool* owned, double decay, int64_t warmup, int64_t interval,
                                    double hysteresis, int64_t keep, double threshold, int64_t least,
                                    int64_t probe_interval, int64_t probe_steps, int64_t select, int64_t L, int64_t K,
                                    int64_t rows, int64_t threads, int64_t seed) {
  return guarded([&] {
    const masm::MaskPolicy policy{decay,     warmup, interval,       hysteresis,  keep,
                                  threshold, least,  probe_interval, probe_steps, select != 0};
    const int64_t n = L * K;
    const masm::MaskTable table{.L = L,
                                .K = K,
                                .rows = rows,
                                .signal = sums,
                                .power = sums + n,
                                .idle = counts,
                                .probing = counts + n,
                                .selected = masks,
                                .in_force = masks + n,
                                .live = live,
                                .step = counters,
                                .selections = counters + 1,
                                .history = history,
                                .history_steps = history_steps,
                                .stats = stats,
                                .found = found,
                                .owned = owned};
    emulation::launch(unsigned(seed), masm::cuda::update_masks_kernel, 1, unsigned(threads), 0, table, policy);
  });
}
