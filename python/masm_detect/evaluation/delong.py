"""The covariance of AUCs of several detectors on the same samples, from the placements of the samples.

`delong` takes samples as independent. `clustered_delong` is its analogue for samples that come in groups (the frames of
a video); with one sample a group both are the same.

Sources: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988); Sun and Xu, "Fast implementation of DeLong's
algorithm", IEEE Signal Processing Letters 21 (2014); Obuchowski, "Nonparametric analysis of clustered ROC curve data",
Biometrics 53 (1997).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata


def placements(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each fake the share of reals below it, [k, fakes]; of each real the share of fakes above it, [k, reals].

    Args:
        labels: [n], 1 = fake; both classes are there.
        scores: [k, n], of k detectors. Ties count one half. The mean of either result over samples is the AUC.
    """
    fake = np.asarray(labels) == 1
    scores = np.asarray(scores, dtype=np.float64)
    m, n = int(fake.sum()), int((~fake).sum())
    ranks = rankdata(scores, axis=1)  # midranks: O(n log n) instead of all pairs
    of_fakes = (ranks[:, fake] - rankdata(scores[:, fake], axis=1)) / n
    of_reals = 1 - (ranks[:, ~fake] - rankdata(scores[:, ~fake], axis=1)) / m
    return of_fakes, of_reals


def aucs(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """AUC [k] of scores [k, n] against labels [n]."""
    return placements(labels, scores)[0].mean(axis=1)


def delong(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUCs and their covariance, for independent samples.

    Args:
        labels: [n], 1 = fake; at least two samples of each class.
        scores: [k, n], of k detectors.

    Returns:
        AUCs [k] and covariance [k, k].
    """
    of_fakes, of_reals = placements(labels, scores)
    covariance = (
        np.atleast_2d(np.cov(of_fakes)) / of_fakes.shape[1] + np.atleast_2d(np.cov(of_reals)) / (of_reals.shape[1])
    )
    return of_fakes.mean(axis=1), covariance


def clustered_delong(
    groups: Sequence[str] | np.ndarray, labels: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUCs and their covariance, for samples that are independent between groups only.

    Args:
        groups: [n], names of the groups; at least two hold each class.
        labels: [n], 1 = fake.
        scores: [k, n], of k detectors.

    Returns:
        AUCs [k] and covariance [k, k].
    """
    _, fakes, reals = influences(groups, labels, scores)
    return aucs(labels, scores), clustered_covariance(groups, labels, fakes, reals)


def influences(
    groups: Sequence[str] | np.ndarray, labels: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How the samples of each group move the AUCs: through its fakes, [G, k], and through its reals, [G, k].

    Returns:
        Names of the groups [G], sorted, and the two parts; each part sums to 0 over the groups.
    """
    names, place = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    fake = np.asarray(labels) == 1
    parts = []
    for side, values in zip((fake, ~fake), placements(labels, scores)):
        centred = (values - values.mean(axis=1, keepdims=True)) / values.shape[1]
        parts.append(np.stack([np.bincount(place[side], weights=row, minlength=len(names)) for row in centred], axis=1))
    return names, parts[0], parts[1]


def clustered_covariance(
    groups: Sequence[str] | np.ndarray, labels: np.ndarray, fakes: np.ndarray, reals: np.ndarray
) -> np.ndarray:
    """Obuchowski's covariance [k, k] from the two parts [G, k] of `influences`, or from sums of their columns."""
    names, fake = np.asarray(groups, dtype=str), np.asarray(labels) == 1
    with_fakes, with_reals, total = len(set(names[fake])), len(set(names[~fake])), len(fakes)
    cross = total / (total - 1) * (fakes.T @ reals)
    return (
        with_fakes / (with_fakes - 1) * (fakes.T @ fakes)
        + with_reals / (with_reals - 1) * (reals.T @ reals)
        + cross
        + cross.T
    )
