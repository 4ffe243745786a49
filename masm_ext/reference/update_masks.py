"""The formula of masm::update_masks_, and its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import check_update_masks


def snr_of(signal: Tensor, power: Tensor) -> Tensor:
    """``signal / power``: 1 for a constant gradient, 0 in the mean for noise, which scatters around it.

    0 before the first step, and if a sum overflowed.
    """
    return (signal / power).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def choose_layers(snr: Tensor, selected: Tensor, hysteresis: float, keep: int, threshold: float, least: int) -> Tensor:
    """The dynamic policy: per subspace, the layers of largest snr. snr, selected [L, K] -> mask float32 [L, K].

    A block that is already selected has an advantage of ``hysteresis |snr|``, so that two near-equal layers do not
    alternate. ``keep`` layers of each subspace are chosen; if it is 0, those above ``threshold``, at least ``least``.
    Between equal scores the earlier layer wins.
    """
    score = torch.where(selected > 0, snr + hysteresis * snr.abs(), snr)
    order = score.sort(dim=0, descending=True, stable=True).indices
    places = torch.arange(len(snr), device=snr.device)[:, None].expand_as(order)
    rank = torch.empty_like(order).scatter_(0, order, places)  # number of layers with a better score
    chosen = rank < keep if keep > 0 else (rank < least) | (score > threshold)
    return chosen.float()


def update_statistics_(sums: Tensor, stats: Tensor, updated: Tensor, decay: float) -> None:
    """Add the (signal, power) of one step to the averages of the blocks that it updated (bool [L, K]), in place.

    The averages start at zero; their ratio needs no bias correction, since both average the same steps."""
    step = stats[: updated.numel()].view(*updated.shape, 2).movedim(-1, 0)  # [2, L, K]
    sums.copy_(torch.where(updated, decay * sums + (1 - decay) * step, sums))


def settle_masks_(counts: Tensor, masks: Tensor, live: Tensor, probe_interval: int, probe_steps: int) -> None:
    """Probe the blocks that have been masked for ``probe_interval`` steps, and set the masks in force, in place."""
    selected, (idle, probing) = masks[0], counts
    masked = selected == 0
    left = torch.where(masked, (probing - 1).clamp_min(0), 0)
    resting = masked & (left == 0)
    due = resting & (idle >= probe_interval) if probe_interval > 0 else torch.zeros_like(resting)
    probing.copy_(left.masked_fill(due, probe_steps))
    idle.copy_(torch.where(resting & ~due, idle + 1, 0))
    force_masks_(counts, masks, live)


def force_masks_(counts: Tensor, masks: Tensor, live: Tensor) -> None:
    """The masks in force, in place: those selected, and 1 where a block is probed."""
    masks[1].copy_(torch.where(counts[1] > 0, 1.0, masks[0]))
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
    """Take one optimizer step into the learning state of all L * K blocks and set the masks of the next, in place.

    State, all of it contiguous on one device:

    - sums float64 [2, L, K]: averages of signal and power with ``decay``, from zero;
    - counts int64 [2, L, K]: steps masked without a break, probe steps left;
    - masks float32 [2, L, K]: as selected, and in force (as selected, or 1 during a probe);
    - live bool [L, K]: where the mask in force is not 0;
    - counters int64 [2]: steps taken, selections made;
    - history float64 [H, L, K, 4] = (mask, snr, signal, power) and history_steps int64 [H]: a ring, selection i is in
      row ``i % H``.

    Inputs: stats float64 [B, 2] with B >= L * K and found float32 [1], as :func:`masked_adamw_` returns them (found not
    0: the step was not taken, and nothing changes here either); owned bool [L, K], blocks that own a part of a
    parameter that got a gradient. Their statistics move, unless they were masked.

    With ``select``, a selection is made every ``interval`` steps from step ``warmup`` on, by :func:`choose_layers`
    (``hysteresis``, ``keep``, ``threshold``, ``least``). A masked block is probed (unmasked) after
    ``probe_interval`` steps (0: never) for ``probe_steps`` steps.

    Nothing here waits for a GPU: a selection is computed in every step and discarded if none is due.
    """
    check_update_masks(
        *(sums, counts, masks, live, counters, history, history_steps, stats, found, owned, decay),
        *(warmup, interval, hysteresis, keep, threshold, least, probe_interval, probe_steps, select),
    )
    before = [t.clone() for t in (sums, counts, masks, live, counters, history_steps)]
    taken = found[0] == 0
    update_statistics_(sums, stats, owned & (masks[1] != 0), decay)
    step, selection = counters[0] + 1, counters[1].clone()
    counters[0].copy_(step)
    if select:
        snr = snr_of(*sums)
        due = taken & (step >= warmup) & ((step - warmup) % interval == 0)
        chosen = choose_layers(snr, masks[0], hysteresis, keep, threshold, least)
        masks[0].copy_(torch.where(due, chosen, masks[0]))
        counters[1].add_(due)
        row = (selection % len(history))[None]
        entry = torch.stack([chosen.double(), snr, *sums], -1)[None]
        history.index_copy_(0, row, torch.where(due, entry, history.index_select(0, row)))
        history_steps.index_copy_(0, row, torch.where(due, step, history_steps.index_select(0, row)))
    settle_masks_(counts, masks, live, probe_interval, probe_steps)
    for t, old in zip((sums, counts, masks, live, counters, history_steps), before):
        t.copy_(torch.where(taken, t, old))
