from __future__ import annotations

import torch
from torch import Tensor


def snr_of(bias2: Tensor, variance: Tensor) -> Tensor:
    """``bias2 / (bias2 + var)``, in [0, 1]: 1 where every batch pulls the same way, near 0 where it is noise.

    0 where sums that overflowed leave no number.
    """
    return (bias2 / (bias2 + variance).clamp_min(torch.finfo(bias2.dtype).tiny)).nan_to_num(nan=0.0)


def variance_of(bias2: Tensor, second: Tensor) -> Tensor:
    """``EMA(||g||^2) - bias2``, not below 0; 0 where sums that overflowed leave no number."""
    return (second - bias2).clamp_min(0).nan_to_num(nan=0.0, posinf=torch.inf)


def choose_layers(snr: Tensor, selected: Tensor, hysteresis: float, keep: int, threshold: float, least: int) -> Tensor:
    """The dynamic policy: per subspace, the layers of largest snr. snr, selected [L, K] -> mask float32 [L, K].

    A block that is selected already is judged with an advantage of ``hysteresis``, so that two near-equal layers do not
    take turns. ``keep`` layers of each subspace are chosen, or, where it is 0, those above ``threshold`` and at least
    ``least``. Between equal scores the earlier layer wins.
    """
    score = torch.where(selected > 0, snr * (1 + hysteresis), snr)
    order = score.sort(dim=0, descending=True, stable=True).indices
    places = torch.arange(len(snr), device=snr.device)[:, None].expand_as(order)
    rank = torch.empty_like(order).scatter_(0, order, places)  # by how many layers a block is beaten
    chosen = rank < keep if keep > 0 else (rank < least) | (score > threshold)
    return chosen.float()


def update_statistics_(sums: Tensor, counts: Tensor, stats: Tensor, updated: Tensor, beta1: float) -> None:
    """Take the sums of one step into the statistics of the blocks that it updated (bool [L, K]), in place."""
    ema_norm2, grad_norm2 = stats[: updated.numel()].view(*updated.shape, 2).unbind(-1)
    updates = counts[0].add_(updated)
    correction = (1 - beta1 ** updates.double()).clamp_min(torch.finfo(torch.float64).tiny)
    grad2 = beta1 * sums[0] + (1 - beta1) * grad_norm2
    fresh = torch.stack([grad2, ema_norm2 / correction.square(), grad2 / correction])
    sums.copy_(torch.where(updated, fresh, sums))


def settle_masks_(counts: Tensor, masks: Tensor, live: Tensor, probe_interval: int, probe_steps: int) -> None:
    """Probe the blocks that have been masked for ``probe_interval`` steps, and set the masks in force, in place."""
    selected, (_, idle, probing) = masks[0], counts
    masked = selected == 0
    left = torch.where(masked, (probing - 1).clamp_min(0), 0)
    resting = masked & (left == 0)
    due = resting & (idle >= probe_interval) if probe_interval > 0 else torch.zeros_like(resting)
    probing.copy_(left.masked_fill(due, probe_steps))
    idle.copy_(torch.where(resting & ~due, idle + 1, 0))
    force_masks_(counts, masks, live)


def force_masks_(counts: Tensor, masks: Tensor, live: Tensor) -> None:
    """The masks in force, in place: those selected, and 1 where a block is probed."""
    masks[1].copy_(torch.where(counts[2] > 0, 1.0, masks[0]))
    live.copy_(masks[1] != 0)


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
    beta1: float,
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
    """Take one optimizer step into the learning state of all L * K blocks and set the masks of the next, in place.

    State, all of it contiguous on one device:

    - sums float64 [3, L, K]: EMA of ``||g||^2`` (not bias-corrected), ``bias2 = ||EMA(g)||^2`` and the same EMA of
      ``||g||^2`` (both bias-corrected);
    - counts int64 [3, L, K]: updates, steps masked without a break, probe steps left;
    - masks float32 [2, L, K]: what the policy wants, and what is in force (the same, or probed);
    - live bool [L, K]: where the mask in force is not 0;
    - counters int64 [2]: steps taken, selections made;
    - history float64 [H, L, K, 4] = (mask, snr, bias2, var) and history_steps int64 [H]: a ring, selection i is in row
      ``i % H``.

    Inputs: stats float64 [B, 2] with B >= L * K and found float32 [1], as :func:`masked_adamw_` returns them (found not
    0: the step was not taken, and nothing changes here either); owned bool [L, K], blocks that own a part of a
    parameter that got a gradient. Their statistics move, unless they were masked.

    With ``select``, a selection is made every ``interval`` steps from step ``warmup`` on, by :func:`choose_layers`
    (``hysteresis``, ``keep``, ``threshold``, ``least``). A masked block is probed, that is unmasked, after
    ``probe_interval`` steps (0: never) for ``probe_steps`` steps.

    Nothing here waits for a GPU: what is not due is computed as well, and left out.
    """
    before = [t.clone() for t in (sums, counts, masks, live, counters, history_steps)]
    taken = found[0] == 0
    update_statistics_(sums, counts, stats, owned & (masks[1] != 0), beta1)
    step, selection = counters[0] + 1, counters[1].clone()
    counters[0].copy_(step)
    if select:
        bias2, second = sums[1:]
        var = variance_of(bias2, second)
        snr = snr_of(bias2, var)
        due = taken & (step >= warmup) & ((step - warmup) % interval == 0)
        chosen = choose_layers(snr, masks[0], hysteresis, keep, threshold, least)
        masks[0].copy_(torch.where(due, chosen, masks[0]))
        counters[1].add_(due)
        row = (selection % len(history))[None]
        entry = torch.stack([chosen.double(), snr, bias2, var], -1)[None]
        history.index_copy_(0, row, torch.where(due, entry, history.index_select(0, row)))
        history_steps.index_copy_(0, row, torch.where(due, step, history_steps.index_select(0, row)))
    settle_masks_(counts, masks, live, probe_interval, probe_steps)
    for t, old in zip((sums, counts, masks, live, counters, history_steps), before):
        t.copy_(torch.where(taken, t, old))
