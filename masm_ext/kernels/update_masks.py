"""masm::update_masks_ on CUDA without libmasm_cuda: one launch a step, and nothing waits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import check_update_masks
from . import mask_table
from .launch import next_power_of_2, on_device, run


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
    """As :func:`masm_ext.reference.update_masks_`."""
    state = (sums, counts, masks, live, counters, history, history_steps)
    rules = (decay, warmup, interval, hysteresis, keep, threshold, least, probe_interval, probe_steps, select)
    check_update_masks(*state, stats, found, owned, *rules)
    names = ("DECAY", "WARMUP", "INTERVAL", "HYSTERESIS", "KEEP", "THRESHOLD", "LEAST", "PROBE_INTERVAL", "PROBE_STEPS")
    constants = dict(zip((*names, "SELECT"), rules, strict=True))
    L, K = live.shape
    tables = (sums, counts, masks, live.view(torch.uint8), counters, history, history_steps)
    operands = (*tables, stats, found, owned.view(torch.uint8), L, K, len(history))
    with on_device(sums):
        run(
            mask_table.update_masks,
            (1,),
            *operands,
            **constants,
            BLOCK=min(512, next_power_of_2(max(L * K, 1))),
            warps=4,
        )
