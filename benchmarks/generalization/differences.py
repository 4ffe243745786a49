"""Differences between two variants of a study, with intervals: `masm_detect.evaluation.differences` on its units.

Both variants score the same images, and each seed of both draws the same training images from one pool: the comparison
is paired by image and by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from masm_detect.evaluation import differences
from masm_detect.evaluation.differences import Difference, Part


def against_real(datasets: Sequence[str], methods: Sequence[str], forgery: str) -> np.ndarray:
    """Which units, bool [n], measure a forgery: its own, and the real ones of its data set."""
    datasets_, methods_ = np.asarray(datasets), np.asarray(methods)
    own = methods_ == forgery
    return own | ((methods_ == "real") & np.isin(datasets_, datasets_[own]))


def parts_of(
    datasets: Sequence[str],
    methods: Sequence[str],
    groups: Sequence[int],
    scores_a: Sequence[Sequence[float]],
    scores_b: Sequence[Sequence[float]],
    forgeries: Sequence[str],
) -> list[Part]:
    """The units of each forgery and of the real ones of its data set, with the scores of a and b.

    Args:
        datasets, methods: data set of each of n units, and its forgery or "real".
        groups: what is left out as one.
        scores_a, scores_b: [S, n] scores of S seeds, in the same order of seeds.
        forgeries: one part each.
    """
    labels = (np.asarray(methods) != "real").astype(int)
    a, b = (np.asarray([np.asarray(one) for one in scores]) for scores in (scores_a, scores_b))
    parts = []
    for forgery in forgeries:
        keep = against_real(datasets, methods, forgery)
        parts.append(Part(np.asarray(groups)[keep].astype(str), labels[keep], a[:, keep], b[:, keep]))
    return parts


def difference(parts: Sequence[Part]) -> Difference:
    """AUC of a minus AUC of b, the mean over seeds and parts.

    With one seed there is no error: the training varies, and one run cannot tell how much.
    """
    found = differences.difference(parts)
    return found if len(parts[0].a) > 1 else replace(found, sources=(), reason="one seed")
