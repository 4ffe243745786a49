"""How often each block was selected, compared with a random selection of as many layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binom

#: Share of random counts that the reported range holds.
COVERAGE = 0.95


def mask_report(history: Sequence[Mapping[str, Any]], layers: Sequence[str], seed: int) -> dict[str, Any] | None:
    """The selections of a run beside random ones.

    Under random selection, the count of a block (one subspace of one layer) in S selections is binomial: S draws with
    the probability p_k, the mean share of layers that subspace k had. Selections of a run are not independent (running
    averages, hysteresis), so counts outside the range are no test of significance: they measure how much the masks
    prefer some layers.

    Args:
        history: one entry for each selection, with "step" and "mask" [L][K] in [0, 1]; above 0 is selected.
        layers: names of the L layers.
        seed: of the random masks.

    Returns:
        None without a selection. Else {"steps": [S], "layers", "mask": [S][L][K], "random": {"seed", "mask":
        [S][L][K]: as many layers of each subspace at each step, drawn at random}, "density": [K], "counts": [L][K],
        "expected": [K] and "range": [K] of [low, high], of random counts, "outside": share of the blocks outside that
        range, "outside_random": the same of the random masks, "changed", "changed_random": mean share of the blocks
        whose state differs from the selection before (None with one selection), "active_at_the_end": [L][K]}.
    """
    if not history:
        return None
    masks = np.array([entry["mask"] for entry in history], dtype=float)  # [S, L, K]
    selected = masks > 0
    S, _, K = masks.shape
    drawn = random_masks(selected, seed)
    density = selected.mean(axis=(0, 1))  # [K]
    low, high = (binom.ppf(q, S, density) for q in ((1 - COVERAGE) / 2, (1 + COVERAGE) / 2))

    def outside(some: np.ndarray) -> float:
        counts = some.sum(axis=0)
        return float(((counts < low) | (counts > high)).mean())

    return {
        "steps": [entry["step"] for entry in history],
        "layers": list(layers),
        "mask": masks.tolist(),
        "random": {"seed": seed, "mask": drawn.astype(float).tolist()},
        "density": density.tolist(),
        "counts": selected.sum(axis=0).tolist(),
        "expected": (S * density).tolist(),
        "range": [[int(low[k]), int(high[k])] for k in range(K)],
        "outside": outside(selected),
        "outside_random": outside(drawn),
        "changed": _changed(selected),
        "changed_random": _changed(drawn),
        "active_at_the_end": selected[-1].tolist(),
    }


def random_masks(selected: np.ndarray, seed: int) -> np.ndarray:
    """Masks bool [S, L, K] with as many layers in each selection and subspace as `selected` [S, L, K], at random."""
    random = np.random.default_rng(seed)
    order = random.random(selected.shape).argsort(axis=1).argsort(axis=1)  # a random rank for each layer
    return order < selected.sum(axis=1, keepdims=True)


def _changed(selected: np.ndarray) -> float | None:
    """Mean share of the blocks whose state differs from that one selection before."""
    return float((selected[1:] != selected[:-1]).mean()) if len(selected) > 1 else None
