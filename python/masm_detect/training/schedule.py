"""The learning rate of a step, a function of its arguments alone."""

from __future__ import annotations

import math


def one_cycle(step: int, total: int, warmup: float, final: float) -> float:
    """Rate at `step` of `total` as a fraction of the peak: linear rise over `warmup` of the steps, cosine fall to
    `final`.
    """
    rise = max(1, round(warmup * total)) if warmup > 0 else 0
    if step < rise:
        return (step + 1) / (rise + 1)
    progress = (step - rise) / max(1, total - 1 - rise)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
