"""Two detectors on the same samples: the difference of their AUC, with an interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

from masm_detect.data.sample import Sample

from .intervals import half_width, leave_one_out
from .metrics import MetricsError, check_scores


def compare_scores(
    samples: Sequence[Sample], scores_a: Sequence[float] | np.ndarray, scores_b: Sequence[float] | np.ndarray
) -> dict:
    """AUC of a minus AUC of b on the same samples, with a 95% interval (`intervals`) over `Sample.group`.

    Args:
        samples: n samples of both classes.
        scores_a: P(fake) of the first detector, [n].
        scores_b: P(fake) of the second, [n].

    Returns:
        {"auc_a", "auc_b", "difference", "difference_ci": [low, high], or None with too few groups}.

    Raises:
        MetricsError: as of `metrics.check_scores`, or all samples have one label.
    """
    a, b = check_scores(samples, scores_a), check_scores(samples, scores_b)
    labels = np.array([s.label for s in samples])
    if labels.min() == labels.max():
        raise MetricsError("an AUC needs both classes")
    groups = [s.group for s in samples]
    auc_a, auc_b = float(roc_auc_score(labels, a)), float(roc_auc_score(labels, b))
    difference, interval = auc_a - auc_b, None
    without_a, without_b = leave_one_out(groups, labels, a), leave_one_out(groups, labels, b)
    if without_a is not None and without_b is not None:
        width = half_width(without_a.without - without_b.without, without_a.kind)
        interval = [difference - width, difference + width]
    return {"auc_a": auc_a, "auc_b": auc_b, "difference": difference, "difference_ci": interval}
