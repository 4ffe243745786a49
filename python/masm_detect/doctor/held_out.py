"""How well something tells two classes of images apart: the AUC of a classifier on groups that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from masm_detect.evaluation.intervals import auc_interval

FOLDS = 5
#: An AUC above this is a warning, if its interval does not reach 0.5.
SUSPECT = 0.6
#: An AUC above this is a warning without a look at the interval: there is none with few groups, and one odd image makes
#: that of an AUC near 1 very wide. Noise passes it in 3% of the draws with 5 groups a class, and in 0.5% with 12.
OBVIOUS = 0.8


def held_out_auc(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[str], model: Callable[[], Any], seed: int
) -> dict[str, Any]:
    """AUC of a classifier by cross-validation over groups.

    Each sample is scored by a model that saw no sample of its group. The model learns the direction, too: 0.5 means
    that the features tell nothing. An AUC slightly below 0.5 is chance.

    Args:
        features: float [n, f].
        labels: 0 or 1, [n].
        groups: [n].
        model: makes a classifier of scikit-learn.
        seed: of the division into `FOLDS` parts.

    Returns:
        {"n": samples of each label, "auc", "auc_ci": 95% interval by the jackknife over groups, or None}. The AUC is
        None with fewer than `FOLDS` groups of a class.
    """
    result: dict[str, Any] = {"n": np.bincount(labels, minlength=2).tolist(), "auc": None, "auc_ci": None}
    fold = _folds(groups, labels, seed)
    if fold is None:
        return result
    if (features == features[0]).all():
        return result | {"auc": 0.5}
    scores = np.empty(len(labels))
    for part in range(FOLDS):
        fitted = model().fit(features[fold != part], labels[fold != part])
        scores[fold == part] = fitted.predict_proba(features[fold == part])[:, 1]
    return result | {"auc": float(roc_auc_score(labels, scores)), "auc_ci": auc_interval(groups, labels, scores)}


def is_suspect(numbers: dict[str, Any]) -> bool:
    """Whether an AUC of `held_out_auc` is a warning: high, and not by chance."""
    auc, interval = numbers["auc"], numbers["auc_ci"]
    if auc is None or auc <= SUSPECT:
        return False
    return auc > OBVIOUS or (interval is not None and interval[0] > 0.5)


def _folds(groups: Sequence[str], labels: np.ndarray, seed: int) -> np.ndarray | None:
    """The fold of each sample [n]: whole groups, those with both labels and those with one spread evenly.

    None with fewer than `FOLDS` groups of a label.
    """
    names, place = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    has = [np.bincount(place, weights=labels == label, minlength=len(names)) > 0 for label in (0, 1)]
    if min(has[0].sum(), has[1].sum()) < FOLDS:
        return None
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort((has[0] * 2 + has[1])[order], kind="stable")]
    fold_of_group = np.empty(len(names), dtype=int)
    fold_of_group[order] = np.arange(len(names)) % FOLDS
    return fold_of_group[place]
