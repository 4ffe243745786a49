"""The learning rates of a step, functions of their arguments alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any


def one_cycle(step: int, total: int, warmup: float, final: float) -> float:
    """Rate at `step` of `total` as a fraction of the peak: linear rise over `warmup` of the steps, cosine fall to
    `final`.
    """
    rise = max(1, round(warmup * total)) if warmup > 0 else 0
    if step < rise:
        return (step + 1) / (rise + 1)
    progress = (step - rise) / max(1, total - 1 - rise)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def group_rates(groups: list[dict[str, Any]], fraction: float) -> dict[str, float]:
    """Learning rates by the name of the parameter group; groups of one name are numbered: s/0, s/1.

    Args:
        groups: the parameter groups of the optimizer, with their peak rates as "initial_lr".
        fraction: rate as a fraction of the peak, of `one_cycle`.
    """
    names = [str(group.get("name", "group")) for group in groups]
    several, seen, rates = Counter(names), Counter(), {}
    for name, group in zip(names, groups):
        rates[f"{name}/{seen[name]}" if several[name] > 1 else name] = group["initial_lr"] * fraction
        seen[name] += 1
    return rates
