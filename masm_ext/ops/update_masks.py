"""masm::update_masks_: the learning state and masks of all blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the schemas)
from ..contract import check_update_masks


@torch.library.register_fake("masm::update_masks_")
def _fake(sums, counts, masks, live, counters, history, history_steps, stats, found, owned, *policy):
    check_update_masks(sums, counts, masks, live, counters, history, history_steps, stats, found, owned, *policy)


def update_masks_(
    sums: Tensor,
    counts: Tensor,
    masks: Tensor,
    live: Tensor,
    counters: Tensor,
    history: Tensor,
    history_steps: Tensor,
    stats: Tensor,
    found: Tensor,
    owned: Tensor,
    decay: float,
    warmup: int,
    interval: int,
    hysteresis: float,
    keep: int,
    threshold: float,
    least: int,
    probe_interval: int,
    probe_steps: int,
    select: bool,
) -> None:
    """Update the statistics of all (layer, subspace) blocks after an optimizer step, and set the next masks.

    For training use :class:`masm_ext.LayerMasks`, which keeps the state. All tensors are contiguous and on one device;
    the state is updated in place, without synchronization on CUDA. ``masm_ext/reference/update_masks.py`` has the
    formula.

    Args:
        sums: float64 [2, L, K], running averages of signal and power; zero at the start.
        counts: int64 [2, L, K], for each block the number of consecutive masked steps, and of probe steps left.
        masks: float32 [2, L, K], the selected masks, and the masks in force (as selected, or 1 during a probe).
        live: bool [L, K], where the mask in force is not 0.
        counters: int64 [2], the number of steps taken and of selections made.
        history: float64 [H, L, K, 4] of (mask, snr, signal, power), a ring buffer: selection i is in row ``i % H``.
        history_steps: int64 [H], the steps of these selections.
        stats: float64 [B, 2] with B >= L * K, from :func:`masked_adamw_`.
        found: float32 [1], from :func:`masked_adamw_`; if it is not 0, nothing changes.
        owned: bool [L, K], True for blocks with a gradient in this step.
        decay: decay of the averages per step.
        warmup: step of the first selection.
        interval: steps between selections.
        hysteresis: bonus on the snr of an active block, as a share of its absolute value.
        keep: number of layers in which each subspace is active; 0: use ``threshold``.
        threshold: if ``keep`` is 0, a block is active if its snr is above this.
        least: minimum number of layers in which each subspace stays active.
        probe_interval: steps after which a masked block is probed; 0: never.
        probe_steps: number of steps of a probe.
        select: whether selections are made.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names what arrived.
    """
    torch.ops.masm.update_masks_(
        sums,
        counts,
        masks,
        live,
        counters,
        history,
        history_steps,
        stats,
        found,
        owned,
        decay,
        warmup,
        interval,
        hysteresis,
        keep,
        threshold,
        least,
        probe_interval,
        probe_steps,
        select,
    )
