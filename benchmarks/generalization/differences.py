"""Differences between two variants of a study, with intervals, and their correction for several comparisons.

Two sources of error are added. The test images: a jackknife over their groups, of the mean difference over the seeds,
paired because both variants score the same images (`masm_detect.evaluation.intervals`). The training: the variance of
the difference between seeds, each of which draws other training images from one pool and other starting weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from masm_detect.evaluation.intervals import jackknife_variance, leave_one_out
from scipy.stats import t as student_t


@dataclass(frozen=True)
class Difference:
    """Mean difference of AUC, a minus b.

    Attributes:
        per_seed: of each seed
        error: its standard error; None with fewer than 2 seeds, or too few groups
        freedom: degrees of freedom of Student's t (Welch and Satterthwaite)
    """

    mean: float
    per_seed: tuple[float, ...]
    error: float | None
    freedom: float

    def p_value(self) -> float | None:
        """Two-sided p of no difference."""
        if self.error is None:
            return None
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * student_t.sf(abs(self.mean) / self.error, self.freedom))

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """The interval of a confidence level."""
        if self.error is None:
            return None
        if self.error == 0:
            return self.mean, self.mean
        width = float(student_t.ppf(0.5 + level / 2, self.freedom)) * self.error
        return self.mean - width, self.mean + width


def against_real(datasets: Sequence[str], methods: Sequence[str], forgery: str) -> np.ndarray:
    """Which units, bool [n], measure a forgery: its own, and the real ones of its data set."""
    datasets_, methods_ = np.asarray(datasets), np.asarray(methods)
    own = methods_ == forgery
    return own | ((methods_ == "real") & np.isin(datasets_, datasets_[own]))


def difference(
    datasets: Sequence[str],
    methods: Sequence[str],
    groups: Sequence[int],
    scores_a: Sequence[Sequence[float]],
    scores_b: Sequence[Sequence[float]],
    forgeries: Sequence[str],
) -> Difference:
    """AUC of a minus AUC of b, the mean over seeds and over forgeries (each against the real units of its data set).

    Args:
        datasets, methods: data set of each of n units, and its forgery or "real".
        groups: what is left out as one.
        scores_a, scores_b: [S, n] scores of S seeds, in the same order of seeds.
        forgeries: the forgeries to average over.
    """
    methods_, groups_ = np.asarray(methods), np.asarray(groups)
    seeds = min(len(scores_a), len(scores_b))
    units = np.any([against_real(datasets, methods, forgery) for forgery in forgeries], axis=0)
    names = np.unique(groups_[units].astype(str))
    place = {name: number for number, name in enumerate(names)}
    values, without, usable = np.zeros(seeds), np.zeros(len(names)), True
    for forgery in forgeries:
        keep = against_real(datasets, methods, forgery)
        own, labels = groups_[keep].astype(str), (methods_[keep] != "real").astype(int)
        here = [place[name] for name in np.unique(own)]  # as leave_one_out orders them
        for seed in range(seeds):
            a, b = (leave_one_out(own, labels, np.asarray(scores[seed])[keep]) for scores in (scores_a, scores_b))
            if a is None or b is None:
                usable = False
                continue
            values[seed] += a.auc - b.auc
            change = np.full(len(names), a.auc - b.auc)
            change[here] = a.without - b.without
            without += change
    values, without = values / len(forgeries), without / (len(forgeries) * seeds)
    mean = float(values.mean())
    if not usable or seeds < 2:
        return Difference(mean, tuple(values.tolist()), None, 0.0)
    fake = methods_[units] != "real"
    fakes, reals = (np.isin(names, groups_[units][side].astype(str)) for side in (fake, ~fake))
    of_images, freedom = jackknife_variance(without, np.where(~fakes, 0, np.where(~reals, 1, 2)))
    of_seeds = float(values.var(ddof=1)) / seeds
    total = of_images + of_seeds
    # Welch and Satterthwaite
    freedom = total**2 / max(of_images**2 / freedom + of_seeds**2 / (seeds - 1), 1e-300)
    return Difference(mean, tuple(values.tolist()), float(np.sqrt(total)), float(freedom))


def holm(p_values: Mapping[str, float | None], level: float = 0.95) -> dict[str, float]:
    """The confidence level of each comparison's interval under Holm's correction for all of them.

    The smallest of m p-values is held to 1 - (1 - level) / m, the next to 1 - (1 - level) / (m - 1), and so on; after
    the first comparison that fails, the rest keep its level. So an interval of this level excludes 0 exactly if Holm's
    procedure rejects. Together these intervals need not hold all true values in 95 of 100 studies.
    """
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    levels: dict[str, float] = {}
    alpha, failed = 0.0, False
    for rank, (p, name) in enumerate(known):
        if not failed:
            alpha = (1 - level) / (len(known) - rank)
        levels[name] = 1 - alpha
        failed = failed or p > alpha
    return levels
