"""The kernel of update_masks.py: one program adds the sums of a step to the learning state of all blocks.

Formulas: masm_ext/reference/update_masks.py. A block's index is l * K + k. A selection ranks the scores in its history
record, so no memory here depends on the number of layers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def update_masks(
    SUMS, COUNTS, MASKS, LIVE, COUNTERS, HISTORY, HISTORY_STEPS, STATS, FOUND, OWNED,
    L, K, ROWS,
    DECAY: tl.constexpr, WARMUP: tl.constexpr, INTERVAL: tl.constexpr, HYSTERESIS: tl.constexpr, KEEP: tl.constexpr,
    THRESHOLD: tl.constexpr, LEAST: tl.constexpr, PROBE_INTERVAL: tl.constexpr, PROBE_STEPS: tl.constexpr,
    SELECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Operands as those of masm::update_masks_, LIVE and OWNED as uint8. Grid: 1.

    The rules are constants: they do not change during a run, and Triton would pass floats as float32."""
    decay = tl.full((), DECAY, tl.float64)
    hysteresis = tl.full((), HYSTERESIS, tl.float64)
    threshold = tl.full((), THRESHOLD, tl.float64)
    n = L * K
    step, selection = tl.load(COUNTERS) + 1, tl.load(COUNTERS + 1)
    # number of blocks that change: all, or none if the step was not taken or no selection is due
    taken = tl.where(tl.load(FOUND) == 0, n, 0)
    due = 0
    if SELECT:
        due = tl.where(step >= WARMUP, tl.where((step - WARMUP) % INTERVAL == 0, taken, 0), 0)
    records = HISTORY + (selection % ROWS) * n * 4
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < taken
        seen = inside & (tl.load(OWNED + at, mask=inside, other=0) != 0)
        seen = seen & (tl.load(MASKS + n + at, mask=inside, other=0.0) != 0)
        signal = tl.load(SUMS + at, mask=inside, other=0.0)
        power = tl.load(SUMS + n + at, mask=inside, other=0.0)
        signal = tl.where(seen, decay * signal + (1 - decay) * tl.load(STATS + 2 * at, mask=seen, other=0.0), signal)
        power = tl.where(seen, decay * power + (1 - decay) * tl.load(STATS + 2 * at + 1, mask=seen, other=0.0), power)
        tl.store(SUMS + at, signal, mask=seen)
        tl.store(SUMS + n + at, power, mask=seen)
        if due > 0:
            snr = signal / tl.where(power == 0, 1.0, power)
            snr = tl.where((power != 0) & (tl.abs(snr) < float("inf")), snr, 0.0)
            selected = tl.load(MASKS + at, mask=inside, other=0.0) > 0
            # a selected block has an advantage; the score is stored in place of the mask until all are ranked
            tl.store(records + 4 * at, tl.where(selected, snr + hysteresis * tl.abs(snr), snr), mask=inside)
            tl.store(records + 4 * at + 1, snr, mask=inside)
            tl.store(records + 4 * at + 2, signal, mask=inside)
            tl.store(records + 4 * at + 3, power, mask=inside)
    tl.debug_barrier()  # all scores are written
    if due > 0:
        for first in range(0, n, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < due
            layer, k = at // K, at % K
            score = tl.load(records + 4 * at, mask=inside, other=0.0)
            rank = tl.zeros((BLOCK,), tl.int64)  # number of layers of its subspace with a better score
            for other in range(0, L):
                of_other = tl.load(records + 4 * (other * K + k), mask=inside, other=0.0)
                rank += ((of_other > score) | ((of_other == score) & (other < layer))).to(tl.int64)
            if KEEP > 0:
                chosen = rank < KEEP
            else:
                chosen = (rank < LEAST) | (score > threshold)
            tl.store(MASKS + at, chosen.to(tl.float32), mask=inside)
    tl.debug_barrier()  # all scores are read
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < taken
        selected = tl.load(MASKS + at, mask=inside, other=0.0)
        tl.store(records + 4 * at, selected.to(tl.float64), mask=at < due)
        idle, probing = tl.load(COUNTS + at, mask=inside, other=0), tl.load(COUNTS + n + at, mask=inside, other=0)
        masked = selected == 0
        probing = tl.where(masked & (probing > 0), probing - 1, 0)
        resting = masked & (probing == 0)
        probe = resting & (idle >= PROBE_INTERVAL) if PROBE_INTERVAL > 0 else resting & (idle < 0)
        probing = tl.where(probe, PROBE_STEPS, probing)
        in_force = tl.where(probing > 0, 1.0, selected)
        tl.store(COUNTS + at, tl.where(resting, tl.where(probe, 0, idle + 1), 0), mask=inside)
        tl.store(COUNTS + n + at, probing, mask=inside)
        tl.store(MASKS + n + at, in_force, mask=inside)
        tl.store(LIVE + at, (in_force != 0).to(tl.uint8), mask=inside)
    if taken > 0:
        tl.store(COUNTERS, step)
    if due > 0:
        tl.store(HISTORY_STEPS + selection % ROWS, step)
        tl.store(COUNTERS + 1, selection + 1)
