"""Scores to numbers: frame and video AUC, AP, EER, accuracy, with bootstrap intervals clustered by group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from masm_detect.data.records import Sample
from masm_detect.errors import UserError

PROTOCOLS = ("correct", "dfb-compat")
CALIBRATION_BINS = 15
#: Fewest groups of each class for an interval. In simulation the 95% percentile interval over groups held the true AUC
#: in 0.55 of the cases with 2 groups and in 0.78 with 4: such an interval would promise what it does not keep.
MIN_CLUSTERS = 8


class MetricsError(UserError, ValueError):
    """The scores cannot be evaluated: wrong length, not finite, not probabilities, one class only."""


def evaluate_scores(
    samples: Sequence[Sample],
    scores: Sequence[float] | np.ndarray,
    n_bootstrap: int = 1000,
    seed: int = 0,
    protocol: str = "correct",
) -> dict:
    """Metrics per data set and per forgery method; a method is scored against all real samples of its data set.

    Args:
        samples, scores: one P(fake) in [0, 1] per sample, in the same order.
        n_bootstrap: resamples of the 95% intervals, drawn over `Sample.group`; 0 = no intervals. With fewer than
            MIN_CLUSTERS groups of one class there is no interval either.
        protocol: "correct": a video is `Sample.video`. "dfb-compat": as DeepfakeBench's code does it, a video is the
            name of the parent folder alone, so that equally named videos of several methods merge, and a mixed one
            counts as real. Only the video metrics differ.

    Returns (JSON-able): {"protocol", "n_bootstrap", "seed", "n", "datasets":
    {name: {"all": M, "methods": {method: M}}}},
    M = {n_real, n_fake, n_real_videos, n_fake_videos, n_groups, n_real_groups, n_fake_groups, auc, auc_ci, ap, eer,
    accuracy, tpr_at_1fpr, ece, video_auc, video_auc_ci}; a number that is not defined (one class only in that
    data set) is None.

    Raises MetricsError: lengths differ, a score is not finite or outside [0, 1], or all samples have one label.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    scores = _check_scores(samples, scores)
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
            return _measure([samples[i] for i in part], labels[part], scores[part], n_bootstrap, seed, protocol)

        datasets[dataset] = {"all": measure(index), "methods": {m: measure(part) for m, part in parts.items()}}
    head = {"protocol": protocol, "n_bootstrap": n_bootstrap, "seed": seed, "n": len(samples)}
    return head | {"datasets": datasets}


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
    a, b = _check_scores(samples, scores_a), _check_scores(samples, scores_b)
    labels = np.array([s.label for s in samples])
    if labels.min() == labels.max():
        raise MetricsError("an AUC needs both classes")
    weights = group_weights([s.group for s in samples], labels, n_bootstrap, seed)
    difference = (
        None if weights is None else _interval(weighted_auc(labels, a, weights) - weighted_auc(labels, b, weights))
    )
    auc_a, auc_b = float(roc_auc_score(labels, a)), float(roc_auc_score(labels, b))
    return {"auc_a": auc_a, "auc_b": auc_b, "difference": auc_a - auc_b, "difference_ci": difference}


def equal_error_rate(labels: np.ndarray, scores: np.ndarray) -> float:
    """FPR at the threshold where FPR and FNR are closest (DeepfakeBench's definition)."""
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(fpr[np.argmin(np.abs(1 - tpr - fpr))])


def tpr_at_fpr(labels: np.ndarray, scores: np.ndarray, limit: float = 0.01) -> float:
    """Largest TPR with FPR <= limit. With fewer than 1/limit real samples this means: no false alarm at all."""
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(tpr[fpr <= limit].max())


def calibration_error(labels: np.ndarray, scores: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: |share of fakes - mean score| of equal-width bins, weighted by their counts."""
    place = np.minimum((scores * bins).astype(int), bins - 1)
    gap = np.bincount(place, weights=labels - scores, minlength=bins)
    return float(np.abs(gap).sum() / len(scores))


def video_scores(samples: Sequence[Sample], scores: np.ndarray, protocol: str = "correct"):
    """Mean score per video -> (keys, labels [V], scores [V], groups [V])."""
    place: dict[str, int] = {}
    # A real and a fake with one parent folder merge in DeepfakeBench's code; the mean label is then floored to real.
    index = np.array([place.setdefault(_video_key(s, protocol), len(place)) for s in samples])
    count = np.bincount(index)
    mean = np.bincount(index, weights=scores) / count
    fakes = np.bincount(index, weights=[s.label for s in samples])
    groups = dict(zip(index.tolist(), (s.group for s in samples)))
    return list(place), (fakes == count).astype(int), mean, [groups[i] for i in range(len(place))]


def _video_key(sample: Sample, protocol: str) -> str:
    if protocol == "correct":
        return sample.video
    parts = sample.path.replace("\\", "/").split("/")
    return parts[-2] if len(parts) > 1 else ""


def _measure(
    samples: list[Sample], labels: np.ndarray, scores: np.ndarray, n_bootstrap: int, seed: int, protocol: str
) -> dict:
    _, video_labels, videos, video_groups = video_scores(samples, scores, protocol)
    groups = [s.group for s in samples]
    result: dict = {
        "n_real": int((labels == 0).sum()), "n_fake": int((labels == 1).sum()),
        "n_real_videos": int((video_labels == 0).sum()), "n_fake_videos": int((video_labels == 1).sum()),
        "n_groups": len(set(groups)),
        "n_real_groups": len({g for g, label in zip(groups, labels) if label == 0}),
        "n_fake_groups": len({g for g, label in zip(groups, labels) if label == 1}),
        "accuracy": float(((scores >= 0.5) == labels).mean()), "ece": calibration_error(labels, scores),
    }  # fmt: skip
    result |= dict.fromkeys(("auc", "auc_ci", "ap", "eer", "tpr_at_1fpr", "video_auc", "video_auc_ci"))
    if labels.min() != labels.max():
        result |= {
            "auc": float(roc_auc_score(labels, scores)),
            "auc_ci": _bootstrap_auc(groups, labels, scores, n_bootstrap, seed),
            "ap": float(average_precision_score(labels, scores)),
            "eer": equal_error_rate(labels, scores),
            "tpr_at_1fpr": tpr_at_fpr(labels, scores),
        }
    if video_labels.min() != video_labels.max():
        result["video_auc"] = float(roc_auc_score(video_labels, videos))
        result["video_auc_ci"] = _bootstrap_auc(video_groups, video_labels, videos, n_bootstrap, seed)
    return result


def _check_scores(samples: Sequence[Sample], scores) -> np.ndarray:
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


def _bootstrap_auc(groups, labels: np.ndarray, scores: np.ndarray, n_bootstrap: int, seed: int) -> list[float] | None:
    weights = group_weights(groups, labels, n_bootstrap, seed)
    return None if weights is None else _interval(weighted_auc(labels, scores, weights))


def group_weights(
    groups: Sequence[str], labels: np.ndarray, n_bootstrap: int, seed: int, min_clusters: int = MIN_CLUSTERS
) -> tuple[np.ndarray, np.ndarray] | None:
    """How often each resample draws each group: (counts [B, G], group of each sample [n]); None if a class comes from
    fewer than `min_clusters` groups (at least 2).

    Drawn with replacement among the groups of like kind (real only, fake only, both): so no resample lacks a class, and
    the balance of the classes stays that of the data.
    """
    names, place = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    fakes = np.bincount(place, weights=labels, minlength=len(names))
    size = np.bincount(place, minlength=len(names))
    kind = np.where(fakes == 0, 0, np.where(fakes == size, 1, 2))
    strata = [np.flatnonzero(kind == k) for k in range(3)]
    if n_bootstrap < 1 or min((kind != 1).sum(), (kind != 0).sum()) < max(2, min_clusters):
        return None
    rng = np.random.default_rng(seed)
    counts = np.zeros((n_bootstrap, len(names)), dtype=np.float64)
    for members in strata:
        if len(members):
            counts[:, members] = rng.multinomial(
                len(members), np.full(len(members), 1 / len(members)), size=n_bootstrap
            )
    return counts, place


def weighted_auc(labels: np.ndarray, scores: np.ndarray, weights: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """AUC of every resample of `group_weights`, ties count one half -> [B]. One sort; each resample is a weighted
    rank sum.
    """
    counts, place = weights
    order = np.argsort(scores, kind="stable")
    y, group = labels[order], place[order]
    first = np.r_[True, np.diff(scores[order]) > 0]  # where a block of equal scores starts
    starts = np.flatnonzero(first)
    result = np.empty(len(counts))
    chunk = max(1, 4_000_000 // len(y))  # bounds the memory: about 100 MB
    for low in range(0, len(counts), chunk):
        w = counts[low : low + chunk][:, group]  # [b, n]
        real = np.add.reduceat(w * (y == 0), starts, axis=1)  # [b, blocks]
        fake = np.add.reduceat(w * (y == 1), starts, axis=1)
        below = np.cumsum(real, axis=1) - real
        wins = (fake * (below + 0.5 * real)).sum(axis=1)
        result[low : low + chunk] = wins / (real.sum(axis=1) * fake.sum(axis=1))
    return result


def _interval(values: np.ndarray) -> list[float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]
