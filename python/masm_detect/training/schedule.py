"""The learning rate of a step, and the order of the samples in an epoch: functions of their arguments alone."""

from __future__ import annotations

import math

import numpy as np


def one_cycle(step: int, total: int, warmup: float, final: float) -> float:
    """Rate at `step` of `total` as a fraction of the peak: linear rise over `warmup` of the steps, cosine fall to
    `final`.
    """
    rise = max(1, round(warmup * total)) if warmup > 0 else 0
    if step < rise:
        return (step + 1) / (rise + 1)
    progress = (step - rise) / max(1, total - 1 - rise)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch `epoch` visits `size` samples: a function of its arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(size).tolist()


def epoch_batches(size: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """`epoch_order` in batches."""
    order = epoch_order(size, seed, epoch)
    return [order[start : start + batch_size] for start in range(0, size, batch_size)]
