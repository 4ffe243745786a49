"""Scores to numbers: AUC of frames and videos with intervals, and the metrics of the table `METRICS`.

A new metric is one function of (labels, scores) and one line in `METRICS`: it is then in every result file and table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from masm_detect.data.sample import Sample
from masm_detect.errors import UserError

from .intervals import auc_interval

#: Which frames form one video: of one `Sample.video`, or of one folder name as in DeepfakeBench's code.
VIDEO_KEYS = ("correct", "dfb-compat")
CALIBRATION_BINS = 15


class MetricsError(UserError, ValueError):
    """Scores that cannot be evaluated: wrong length, not finite, not probabilities, one class only."""


def accuracy(labels: np.ndarray, scores: np.ndarray) -> float:
    """Share of samples on the right side of a score of 0.5."""
    return float(((scores >= 0.5) == labels).mean())


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Average precision of the fakes (scikit-learn's definition)."""
    return float(average_precision_score(labels, scores))


def equal_error_rate(labels: np.ndarray, scores: np.ndarray) -> float:
    """The rate at which FPR equals FNR, on straight lines between the thresholds. Equal scores of all samples: 0.5."""
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    gap = fpr - (1 - tpr)  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    before = after - 1
    step = gap[after] - gap[before]
    place = -gap[before] / step if step > 0 else 0.0
    return float(fpr[before] + place * (fpr[after] - fpr[before]))


def tpr_at_fpr(labels: np.ndarray, scores: np.ndarray, limit: float = 0.01) -> float | None:
    """Largest TPR with FPR <= limit; None with fewer than 1 / limit real samples, where one false alarm exceeds it."""
    if (labels == 0).sum() * limit < 1:
        return None
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(tpr[fpr <= limit].max())


def brier_score(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean squared difference of score and label (Brier, Monthly Weather Review 78, 1950); 0.25 for a constant 0.5."""
    return float(np.square(scores - labels).mean())


def reliability(labels: np.ndarray, scores: np.ndarray, bins: int = CALIBRATION_BINS) -> list[tuple[int, float, float]]:
    """Of each bin of equal width on [0, 1]: number of samples, mean score, share of fakes (0 and 0 if it is empty)."""
    place = np.minimum((scores * bins).astype(int), bins - 1)
    count, total, fakes = (np.bincount(place, weights=w, minlength=bins) for w in (None, scores, labels))
    return [(int(n), float(t / max(n, 1)), float(f / max(n, 1))) for n, t, f in zip(count, total, fakes)]


def calibration_error(labels: np.ndarray, scores: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: |share of fakes - mean score| of equal-width bins, weighted by their counts."""
    place = np.minimum((scores * bins).astype(int), bins - 1)
    gap = np.bincount(place, weights=labels - scores, minlength=bins)
    return float(np.abs(gap).sum() / len(scores))


@dataclass(frozen=True)
class Metric:
    """A number of labels [n] (1 = fake) and scores P(fake) [n].

    Attributes:
        function: (labels, scores) -> float
        title: heading of its column in the results table; None: only in result files
        one_class: whether it is defined for samples of one class
        brief: whether its column is also in the table on the terminal, not only in the report
    """

    function: Callable[[np.ndarray, np.ndarray], float | None]
    title: str | None = None
    one_class: bool = False
    brief: bool = True


#: Name in the result files -> metric, in the order of the columns; `video_<name>` is that of the mean scores of videos.
#: AUC is not here: it comes with an interval.
METRICS: dict[str, Metric] = {
    "ap": Metric(average_precision, "AP"),
    "eer": Metric(equal_error_rate, "EER"),
    "accuracy": Metric(accuracy, "acc", one_class=True),
    "tpr_at_1fpr": Metric(tpr_at_fpr, "TPR@1%"),
    "tpr_at_01fpr": Metric(partial(tpr_at_fpr, limit=0.001), "TPR@0.1%", brief=False),
    "brier": Metric(brier_score, "Brier", one_class=True, brief=False),
    "ece": Metric(calibration_error, "ECE", one_class=True, brief=False),
}


#: Mean scores of videos [V] -> whether each is called fake, bool [V] (`calibration.Calibration.calls_fake`).
CallsFake = Callable[[np.ndarray], np.ndarray]


def evaluate_scores(
    samples: Sequence[Sample],
    scores: Sequence[float] | np.ndarray,
    video_key: str = "correct",
    calls_fake: CallsFake | None = None,
) -> dict:
    """Metrics per data set and per forgery method; a method is scored against all real samples of its data set.

    Args:
        samples: n samples.
        scores: P(fake) in [0, 1] of each, [n], in the same order.
        video_key: "correct": a video is `Sample.video`. "dfb-compat": a video is the name of the parent folder alone,
            as in DeepfakeBench's code, so equally named videos of several methods merge, and a mixed one counts as
            real. Only the video metrics differ.
        calls_fake: the decision at the calibrated threshold; None: the detector has none.

    Returns:
        Numbers for JSON: {"video_key", "n", "datasets": {name: {"all": M, "methods": {method: M}}}}, with M = {n_real,
        n_fake, n_real_videos, n_fake_videos, n_groups, n_real_groups, n_fake_groups, auc, auc_ci, the names in METRICS,
        the same with video_ before them, video_accuracy_calibrated, video_auc_by_key: {video key: AUC}}. auc_ci is a
        95% interval over `Sample.group` (`intervals.auc_interval`). A number that is not defined for these samples is
        None.

    Raises:
        MetricsError: lengths differ, a score is not finite or outside [0, 1], or all samples have one label.
    """
    if video_key not in VIDEO_KEYS:
        raise ValueError(f"video_key must be one of {', '.join(VIDEO_KEYS)}, got {video_key!r}")
    scores = check_scores(samples, scores)
    labels = np.array([s.label for s in samples])
    if len(set(labels.tolist())) < 2:
        raise MetricsError(
            f"all {len(samples)} samples are {'fake' if labels[0] else 'real'}: an AUC needs both classes"
        )
    where: dict[str, list[int]] = defaultdict(list)
    for i, s in enumerate(samples):
        where[s.dataset].append(i)
    datasets = {}
    for dataset, indices in sorted(where.items()):
        index = np.array(indices)
        by_method: dict[str, list[int]] = defaultdict(list)
        for i in indices:
            by_method["" if samples[i].label == 0 else samples[i].method].append(i)
        real = by_method.pop("", [])
        parts = {m: np.array(sorted(real + fakes)) for m, fakes in sorted(by_method.items())}

        def measure(part: np.ndarray) -> dict:
            return _measure([samples[i] for i in part], labels[part], scores[part], video_key, calls_fake)

        datasets[dataset] = {"all": measure(index), "methods": {m: measure(part) for m, part in parts.items()}}
    head = {"video_key": video_key, "n": len(samples)}
    return head | {"datasets": datasets}


def _measure(
    samples: list[Sample],
    labels: np.ndarray,
    scores: np.ndarray,
    video_key: str,
    calls_fake: CallsFake | None,
) -> dict:
    _, video_labels, videos, video_groups = video_scores(samples, scores, video_key)
    groups = [s.group for s in samples]
    result: dict = {
        "n_real": int((labels == 0).sum()), "n_fake": int((labels == 1).sum()),
        "n_real_videos": int((video_labels == 0).sum()), "n_fake_videos": int((video_labels == 1).sum()),
        "n_groups": len(set(groups)),
        "n_real_groups": len({g for g, label in zip(groups, labels) if label == 0}),
        "n_fake_groups": len({g for g, label in zip(groups, labels) if label == 1}),
    }  # fmt: skip
    for prefix, *level in (("", labels, scores, groups), ("video_", video_labels, videos, video_groups)):
        result |= {f"{prefix}{name}": value for name, value in _numbers(*level).items()}
    result["video_accuracy_calibrated"] = (
        None if calls_fake is None else float((calls_fake(videos) == video_labels).mean())
    )
    result["video_auc_by_key"] = {key: _video_auc(samples, scores, key) for key in VIDEO_KEYS}
    return result


def _numbers(labels: np.ndarray, scores: np.ndarray, groups: list[str]) -> dict:
    """AUC, its interval and the METRICS; those that are not defined are None."""
    both_classes = labels.min() != labels.max()
    found: dict = dict.fromkeys(("auc", "auc_ci", *METRICS))
    if both_classes:
        found["auc"] = float(roc_auc_score(labels, scores))
        found["auc_ci"] = auc_interval(groups, labels, scores)
    for name, metric in METRICS.items():
        if both_classes or metric.one_class:
            found[name] = metric.function(labels, scores)
    return found


def _video_auc(samples: list[Sample], scores: np.ndarray, video_key: str) -> float | None:
    _, labels, videos, _ = video_scores(samples, scores, video_key)
    return float(roc_auc_score(labels, videos)) if labels.min() != labels.max() else None


def video_scores(
    samples: Sequence[Sample], scores: np.ndarray, video_key: str = "correct"
) -> tuple[list[str], np.ndarray, np.ndarray, list[str]]:
    """Mean score per video -> (keys, labels [V], scores [V], groups [V])."""
    place: dict[str, int] = {}
    # A real and a fake of one parent folder merge in DeepfakeBench's code, and their mean label is rounded down.
    index = np.array([place.setdefault(_key_of(s, video_key), len(place)) for s in samples])
    count = np.bincount(index)
    mean = np.bincount(index, weights=scores) / count
    fakes = np.bincount(index, weights=[s.label for s in samples])
    groups = dict(zip(index.tolist(), (s.group for s in samples)))
    return list(place), (fakes == count).astype(int), mean, [groups[i] for i in range(len(place))]


def _key_of(sample: Sample, video_key: str) -> str:
    if video_key == "correct":
        return sample.video
    parts = sample.path.replace("\\", "/").split("/")
    return parts[-2] if len(parts) > 1 else ""


def check_scores(samples: Sequence[Sample], scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """`scores` as float64 [n]. Raises MetricsError unless there is one finite P(fake) in [0, 1] for each sample."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(samples),):
        raise MetricsError(f"expected one score for each of the {len(samples)} samples, got shape {list(scores.shape)}")
    if not len(samples):
        raise MetricsError("there are no samples to evaluate")
    bad = ~np.isfinite(scores)
    if bad.any():
        raise MetricsError(
            f"{int(bad.sum())} of {len(scores)} scores are not finite, the first of {samples[int(bad.argmax())].path}"
        )
    if scores.min() < 0 or scores.max() > 1:
        raise MetricsError(
            f"scores must be P(fake) in [0, 1], got {scores.min():.4g} to {scores.max():.4g}: "
            "take the sigmoid of logits"
        )
    return scores
