"""Differences between two variants of a study, with intervals: `masm_detect.evaluation.differences` on its units.

Both variants score the same images, and each seed of both draws the same training images from one pool: the comparison
is paired by image and by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from masm_detect.evaluation import differences
from masm_detect.evaluation.differences import Difference, Part, Scored


def against_real(datasets: Sequence[str], methods: Sequence[str], forgery: str) -> np.ndarray:
    """Which units, bool [n], measure a forgery: its own, and the real ones of its data set."""
    datasets_, methods_ = np.asarray(datasets), np.asarray(methods)
    own = methods_ == forgery
    return own | ((methods_ == "real") & np.isin(datasets_, datasets_[own]))


def scored_parts(units: Mapping[str, Any], rows: np.ndarray, forgeries: Sequence[str]) -> list[Scored]:
    """The units of each forgery and of the real ones of its data set, with the scores of several runs.

    Args:
        units: `datasets`, `methods` (the forgery or "real") and `groups` (what is left out as one) of each of n units.
        rows: [runs, n] scores.
        forgeries: one part each.
    """
    labels, groups = (np.asarray(units["methods"]) != "real").astype(int), np.asarray(units["groups"]).astype(str)
    kept = [against_real(units["datasets"], units["methods"], forgery) for forgery in forgeries]
    return [Scored(groups[keep], labels[keep], np.asarray(rows)[:, keep]) for keep in kept]


def parts_of(
    units: Mapping[str, Any],
    scores_a: Sequence[Sequence[float]],
    scores_b: Sequence[Sequence[float]],
    forgeries: Sequence[str],
) -> list[Part]:
    """As `scored_parts`, with the scores of two variants a and b, [S, n] each, in the same order of S seeds."""
    found = scored_parts(units, np.array([*scores_a, *scores_b]), forgeries)
    seeds = len(scores_a)
    return [Part(one.groups, one.labels, one.rows[:seeds], one.rows[seeds:]) for one in found]


def difference(parts: Sequence[Part]) -> Difference:
    """AUC of a minus AUC of b, the mean over seeds and parts.

    With one seed there is no error: the training varies, and one run cannot tell how much.
    """
    found = differences.difference(parts)
    return found if len(parts[0].a) > 1 else replace(found, sources=(), reason="one seed")


def cells(value: Difference, level: float | None) -> str:
    """Cells of a table: a difference, its 95% interval, that of the corrected level (None: there is none), and p."""
    spans = [None if one is None else value.interval(one) for one in (0.95, level)]
    shown = ["-" if span is None else "[{:+.3f}, {:+.3f}]".format(*span) for span in spans]
    return f"{value.mean:+.3f} | {' | '.join(shown)} | {shown_p(value.p_value())} |"


def shown_p(value: float | None) -> str:
    """A p-value of three digits."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.0005 else "< 0.001"
