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
    """Take one optimizer step into the learning state of all (layer, subspace) blocks; set the masks of the next.

    For training use :class:`masm_ext.LayerMasks`, which keeps the state. All tensors are contiguous and on one device;
    the state is updated in place. On CUDA nothing waits for the device. The formula:
    ``masm_ext/reference/update_masks.py``.

    Args:
        sums: float64 [2, L, K], averages of signal and power, from zero.
        counts: int64 [2, L, K], steps masked without a break, and probe steps left.
        masks: float32 [2, L, K], as selected, and in force (as selected, or 1 during a probe).
        live: bool [L, K], where the mask in force is not 0.
        counters: int64 [2], steps taken, and selections made.
        history: float64 [H, L, K, 4] of (mask, snr, signal, power), a ring: selection i is in row ``i % H``.
        history_steps: int64 [H], the steps of these selections.
        stats: float64 [B, 2] with B >= L * K, as :func:`masked_adamw_` returns it.
        found: float32 [1], likewise; if not 0, nothing changes.
        owned: bool [L, K], blocks that own a part of a parameter with a gradient.
        decay: of the averages, per step.
        warmup: step of the first selection.
        interval: steps between selections.
        hysteresis: advantage of an active block as a share of its snr.
        keep: layers that stay active for each subspace; 0: those above ``threshold``.
        threshold: smallest snr of an active block, where ``keep`` is 0.
        least: layers that stay active for each subspace at least.
        probe_interval: steps after which a masked block is probed; 0: never.
        probe_steps: steps of a probe.
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
