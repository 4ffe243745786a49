"""Two detectors on the same samples: the difference of their AUC, with an interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from masm_detect.data.sample import Sample

from .differences import Part, difference
from .metrics import MetricsError, check_scores


def compare_scores(
    samples: Sequence[Sample], scores_a: Sequence[float] | np.ndarray, scores_b: Sequence[float] | np.ndarray
) -> dict:
    """AUC of a minus AUC of b on the same samples, with a 95% interval (`differences`) over `Sample.group`.

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
    found = difference([Part(np.array([s.group for s in samples]), labels, a[None], b[None])])
    interval = found.interval()
    return {
        "auc_a": found.auc_a[0],
        "auc_b": found.auc_b[0],
        "difference": found.mean,
        "difference_ci": None if interval is None else list(interval),
    }
