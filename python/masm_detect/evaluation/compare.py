"""Two detectors on the same samples: the difference of their AUC, with an interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

from masm_detect.data.sample import Sample

from .intervals import group_weights, percentile_interval, weighted_auc
from .metrics import MetricsError, check_scores


def compare_scores(
    samples: Sequence[Sample],
    scores_a: Sequence[float] | np.ndarray,
    scores_b: Sequence[float] | np.ndarray,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """AUC of a minus AUC of b on the same samples, resampled together over `Sample.group`.

    -> {"auc_a", "auc_b", "difference", "difference_ci": [low, high] or None}.
    """
    a, b = check_scores(samples, scores_a), check_scores(samples, scores_b)
    labels = np.array([s.label for s in samples])
    if labels.min() == labels.max():
        raise MetricsError("an AUC needs both classes")
    weights = group_weights([s.group for s in samples], labels, n_bootstrap, seed)
    difference = None
    if weights is not None:
        difference = percentile_interval(weighted_auc(labels, a, weights) - weighted_auc(labels, b, weights))
    auc_a, auc_b = float(roc_auc_score(labels, a)), float(roc_auc_score(labels, b))
    return {"auc_a": auc_a, "auc_b": auc_b, "difference": auc_a - auc_b, "difference_ci": difference}
