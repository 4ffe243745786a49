"""The difference between the AUC of two detectors on the same samples, with an interval, and its p-value.

A detector may be several training runs that differ in their seed. Two sources of error are then added:

- the test samples: the variance over groups of the mean difference over seeds and data sets, paired, because both
  detectors score the same samples. Three estimates are in `VARIANCES`; the jackknife over groups is the default.
- the training: the variance of the difference between seeds, divided by their number.

With two crossed factors, groups and seeds, the variance of the mean is V(groups) + V(seeds) - V(groups x seeds)
(Cameron, Gelbach and Miller, Journal of Business & Economic Statistics 29, 2011). Both terms above contain the third
one. It is not subtracted: the estimate could become negative with few seeds, and the sum errs on the side of no claim
(Owen, Annals of Applied Statistics 1, 2007, on crossed random effects).

Each source has an interval of its own, by Student's t; the squares of their half-widths add up (Howe, Journal of the
American Statistical Association 69, 1974; Zou and Donner, Statistics in Medicine 27, 2008). One t with the degrees of
freedom of Welch and Satterthwaite claims too much: with two seeds that vary more than the test samples do, equal
detectors were told apart in 9% to 12% of simulated studies instead of 5%.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import t as student_t

from .delong import aucs, clustered_covariance, influences
from .intervals import jackknife_variance, leave_one_out, obstacle

#: Resamples of the clustered bootstrap, and how many are computed at a time.
DRAWS, _CHUNK = 2000, 50
#: The smallest p-value that is computed if there are several sources of error.
_SMALLEST_P = 1e-30


@dataclass(frozen=True)
class Source:
    """A source of error.

    Attributes:
        variance: its share in the variance of the difference
        freedom: degrees of freedom of the estimate of this variance
    """

    variance: float
    freedom: float


@dataclass(frozen=True)
class Difference:
    """Mean difference of AUC, a minus b.

    Attributes:
        auc_a: of a, its mean over data sets, for each of its seeds
        auc_b: of b
        sources: of its error, the groups first, then the seeds; none, if there is no interval, for `reason`
        reason: why there is no interval; "" if there is one
    """

    auc_a: tuple[float, ...]
    auc_b: tuple[float, ...]
    sources: tuple[Source, ...]
    reason: str = ""

    @property
    def mean(self) -> float:
        """The difference."""
        return float(np.mean(self.auc_a) - np.mean(self.auc_b))

    @property
    def per_seed(self) -> tuple[float, ...]:
        """The difference of each seed, in order; of as many as both have."""
        return tuple(a - b for a, b in zip(self.auc_a, self.auc_b))

    @property
    def error(self) -> float | None:
        """Standard error of the difference; None without sources."""
        return float(np.sqrt(sum(source.variance for source in self.sources))) if self.sources else None

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """The interval [low, high]; None without sources.

        Args:
            level: of confidence, in (0, 1).
        """
        if not self.sources:
            return None
        width = self._half_width(1 - level)
        return self.mean - width, self.mean + width

    def p_value(self) -> float | None:
        """Two-sided p of no difference: 1 minus the level of the interval that ends at 0; None without sources."""
        if not self.sources:
            return None
        size = abs(self.mean)
        if self.error == 0:
            return 1.0 if size == 0 else 0.0
        if len(self.sources) == 1:
            return float(2 * student_t.sf(size / self.error, self.sources[0].freedom))
        if self._half_width(_SMALLEST_P) <= size:
            return _SMALLEST_P
        # over the logarithm, so that small p-values are exact, too
        root = brentq(lambda log_p: self._half_width(np.exp(log_p)) - size, np.log(_SMALLEST_P), 0.0, xtol=1e-10)
        return float(np.exp(root))

    def _half_width(self, alpha: float) -> float:
        """Half of the interval that misses the true difference in a share `alpha` of all studies."""
        squares = (student_t.isf(alpha / 2, one.freedom) ** 2 * one.variance for one in self.sources if one.variance)
        return float(np.sqrt(sum(squares)))


@dataclass(frozen=True)
class Part:
    """The samples of one data set (or of one forgery and its reals) with the scores of two detectors.

    Attributes:
        groups: [n], names of what is independent
        labels: [n], 1 = fake
        a: [S, n], scores of S seeds of the first detector
        b: [T, n], scores of T seeds of the second
    """

    groups: np.ndarray
    labels: np.ndarray
    a: np.ndarray
    b: np.ndarray

    def weights(self) -> np.ndarray:
        """[S + T], how much the AUC of each row of `scores` counts in the difference."""
        return np.r_[np.full(len(self.a), 1 / len(self.a)), np.full(len(self.b), -1 / len(self.b))]

    def scores(self) -> np.ndarray:
        """[S + T, n], the scores of a and b."""
        return np.concatenate([self.a, self.b])


def difference(parts: Sequence[Part], *, variance: str = "jackknife", paired: bool = True, seed: int = 0) -> Difference:
    """AUC of a minus AUC of b, the mean over parts and over seeds.

    Args:
        parts: one for each data set, all with the same seeds. A group may be in several of them.
        variance: a name in `VARIANCES`: how the variance over groups is estimated.
        paired: the seeds of a and b belong together, in order (the same training images, say), if they are as many.
            Otherwise the variances over the seeds of a and of b are added.
        seed: of the bootstrap.

    Returns:
        The difference. Its only source of error are the groups if a and b have one seed each; if one of them has one
        seed, its training is taken as fixed.
    """
    auc_a, auc_b = (np.mean([aucs(part.labels, scores) for part, scores in rows], axis=0)
                    for rows in ([(p, p.a) for p in parts], [(p, p.b) for p in parts]))  # fmt: skip
    found = tuple(map(float, auc_a)), tuple(map(float, auc_b))
    for part in parts:
        if (reason := obstacle(part.groups.tolist(), part.labels)) is not None:
            return Difference(*found, (), reason)
    sources = [Source(*VARIANCES[variance](parts, seed))]
    pairs = paired and len(auc_a) == len(auc_b)
    for values in [auc_a - auc_b] if pairs else [auc_a, auc_b]:
        if len(values) > 1:
            sources.append(Source(float(values.var(ddof=1)) / len(values), len(values) - 1))
    return Difference(*found, tuple(sources))


def _union(parts: Sequence[Part | Scored]) -> tuple[np.ndarray, np.ndarray]:
    """Names of the groups of all parts, sorted, [G], and their kind as in `intervals.LeaveOneOut`."""
    groups = np.concatenate([part.groups.astype(str) for part in parts])
    fake = np.concatenate([part.labels for part in parts]) == 1
    names = np.unique(groups)
    fakes, reals = (np.isin(names, groups[side]) for side in (fake, ~fake))
    return names, np.where(~fakes, 0, np.where(~reals, 1, 2))


@dataclass(frozen=True)
class Scored:
    """The samples of one data set (or of one forgery and its reals) with the scores of several detectors.

    Attributes:
        groups: [n], names of what is independent
        labels: [n], 1 = fake
        rows: [detectors, n], their scores
    """

    groups: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


def left_out(parts: Sequence[Scored]) -> tuple[np.ndarray, np.ndarray]:
    """The AUC of each detector, its mean over parts, without each group in turn.

    Args:
        parts: all of the same detectors; none has an `intervals.obstacle`.

    Returns:
        AUCs [detectors, G], and the kind of each group as in `intervals.LeaveOneOut` [G].
    """
    names, kind = _union(parts)
    without = np.zeros((len(parts[0].rows), len(names)))
    for part in parts:
        here = np.searchsorted(names, np.unique(part.groups.astype(str)))  # as leave_one_out orders them
        for row, scores in zip(without, part.rows):
            left = leave_one_out(part.groups.tolist(), part.labels, scores)
            assert left is not None  # see Args
            change = np.full(len(names), left.auc)
            change[here] = left.without
            row += change / len(parts)
    return without, kind


def _jackknife(parts: Sequence[Part], seed: int) -> tuple[float, float]:
    """Variance of the mean difference by leaving out each group in turn, and degrees of freedom (`intervals`)."""
    without, kind = left_out([Scored(part.groups, part.labels, part.scores()) for part in parts])
    return jackknife_variance(parts[0].weights() @ without, kind)


def _delong(parts: Sequence[Part], seed: int) -> tuple[float, float]:
    """Obuchowski's variance (`delong.clustered_delong`); parts that share groups add their covariance."""
    names, kind = _union(parts)
    total, own, squares = np.zeros(len(names)), 0.0, 0.0
    for part in parts:
        here, fakes, reals = influences(part.groups, part.labels, part.scores())
        fakes, reals = ((side @ part.weights())[:, None] / len(parts) for side in (fakes, reals))
        own += float(clustered_covariance(part.groups, part.labels, fakes, reals)[0, 0])
        both = (fakes + reals)[:, 0]
        squares += float(both @ both)
        total[np.searchsorted(names, here)] += both
    return max(0.0, own + float(total @ total) - squares), jackknife_variance(total, kind)[1]


def _bootstrap(parts: Sequence[Part], seed: int) -> tuple[float, float]:
    """Variance over `DRAWS` resamples of the groups, each kind of groups on its own.

    Of n groups n - 1 are drawn, which makes the variance of a mean unbiased (Rao and Wu, Journal of the American
    Statistical Association 83, 1988).
    """
    names, kind = _union(parts)
    random = np.random.default_rng(seed)
    counts = np.zeros((DRAWS, len(names)))
    for one in range(3):
        if size := int((kind == one).sum()):
            counts[:, kind == one] = random.multinomial(max(1, size - 1), np.full(size, 1 / size), DRAWS)
    values = np.zeros(DRAWS)
    for part in parts:
        place = np.searchsorted(names, part.groups.astype(str))
        for weight, scores in zip(part.weights(), part.scores()):
            values += weight / len(parts) * _weighted_aucs(part.labels, scores, counts, place)
    return float(np.nanvar(values, ddof=1)), _jackknife(parts, seed)[1]


def _weighted_aucs(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray, place: np.ndarray) -> np.ndarray:
    """AUC of each row of counts [draws, G], in which sample i counts as often as its group, place[i]."""
    order = np.argsort(scores, kind="stable")
    fake, place, score = labels[order] == 1, place[order], scores[order]
    start = np.flatnonzero(np.r_[True, score[1:] != score[:-1]])  # where a run of equal scores starts
    found = []
    for first in range(0, len(counts), _CHUNK):
        weight = counts[first : first + _CHUNK, place]
        fakes, reals = (np.add.reduceat(weight * side, start, axis=1) for side in (fake, ~fake))
        below = np.cumsum(reals, axis=1) - reals / 2  # ties count one half
        pairs = fakes.sum(axis=1) * reals.sum(axis=1)
        with np.errstate(invalid="ignore"):  # a resample without one class has no AUC
            found.append((fakes * below).sum(axis=1) / pairs)
    return np.concatenate(found)


#: How the variance over groups is estimated: (parts, seed) -> variance of the mean difference, degrees of freedom.
VARIANCES: dict[str, Callable[[Sequence[Part], int], tuple[float, float]]] = {
    "jackknife": _jackknife,
    "delong": _delong,
    "bootstrap": _bootstrap,
}


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


def holm_p_values(p_values: Mapping[str, float | None]) -> dict[str, float]:
    """p-values adjusted by Holm's procedure.

    Args:
        p_values: of each comparison, by its name; None: it has none, and does not count.

    Returns:
        The adjusted p-values. Those up to 0.05 reject: in studies without any difference, at most 5% reject something.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[name] = largest
    return adjusted
