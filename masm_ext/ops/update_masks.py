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

    Arguments: :func:`masm_ext.reference.update_masks_`. All tensors contiguous, on one device. For training use
    :class:`masm_ext.LayerMasks`, which keeps the state. On CUDA nothing waits for the device.

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
