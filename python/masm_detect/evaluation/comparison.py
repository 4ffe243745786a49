"""The comparison of detectors that scored the same samples: differences of AUC, p-values under Holm, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np

from masm_detect.data.sample import Sample
from masm_detect.hashes import file_sha256
from masm_detect.provenance import provenance

from .delong import aucs
from .differences import Difference, Part, difference, holm, holm_p_values
from .metrics import video_scores
from .score_sets import CompareError, Detector, Matched, load_detectors, match

#: With more detectors, all are compared with the first instead of with each other.
MOST_PAIRS_OF = 4
MEAN = "mean of data sets"
CANNOT = "cannot be told apart"
LEVEL = 0.95


def compare(
    evals: Sequence[str],
    *,
    group: Sequence[str] = (),
    baseline: str | None = None,
    intersect: bool = False,
    variance: Literal["jackknife", "delong", "bootstrap"] = "jackknife",
    seed: int = 0,
) -> dict[str, Any]:
    """Compare detectors by their scores of the same samples.

    The verdicts are at one level: of videos if a video has several images, else of images. Holm's correction is over
    all their comparisons: every pair on every data set, and on the mean of the data sets.

    Args:
        evals: evaluation folders, folders of runs in them, and score files.
        group: NAME=EVAL,EVAL,...: runs that are the seeds of one detector; without it, runs named alike but for a seed
            (NAME-seed1, NAME-seed2)
        baseline: name of the detector that the others are compared with; null: all pairs of up to 4 detectors, with
            more of them the first
        intersect: compare the samples that all have; without it, different samples are an error
        variance: how the variance over groups of samples is estimated. jackknife: each group is left out in turn;
            delong: DeLong's for clustered samples (Obuchowski 1997); bootstrap: 2000 resamples of the groups
        seed: seed of the bootstrap

    Returns:
        The content of compare.json: {"provenance", "settings", "level": "video" or "image", "detectors", "left_out",
        "datasets", "comparisons", "notes"}.

    Raises:
        CompareError: as of `score_sets.load_detectors` and `score_sets.match`, an unknown baseline, or no data set of
            both classes.
    """
    detectors = load_detectors(evals, group)
    matched = match(detectors, intersect)
    labels: dict[str, set[int]] = {}
    for sample in matched.samples:
        labels.setdefault(sample.dataset, set()).add(sample.label)
    names = sorted(name for name, found in labels.items() if len(found) == 2)
    if not names:
        raise CompareError("all samples have one label: an AUC needs real and fake ones in a data set")
    units = {(level, name): _Units(matched, detectors, name, level) for level in ("image", "video") for name in names}
    several = any(len(units["video", name].labels) < len(units["image", name].labels) for name in names)
    level = "video" if several else "image"
    rows = []
    for a, b in _pairs(detectors, baseline):
        for where in ("video", "image") if several else ("image",):
            for dataset in [*names, *([MEAN] if len(names) > 1 else [])]:
                own = [units[where, name] for name in (names if dataset == MEAN else [dataset])]
                rows.append(_compared(a, b, where, dataset, own, variance, seed))
    _judge([row for row in rows if row["level"] == level])
    return {
        "format": "masm-detect-comparison",
        "version": 1,
        "provenance": provenance(),
        "settings": {"variance": variance, "baseline": baseline, "intersect": intersect, "seed": seed, "level": LEVEL},
        "level": level,
        "detectors": {one.name: _about(one, units) for one in detectors},
        "left_out": matched.left_out,
        "datasets": {name: {lvl: units[lvl, name].counts() for lvl in ("image", "video")} for name in names},
        "comparisons": [{key: value for key, value in row.items() if key != "found"} for row in rows],
        "notes": _notes(detectors, sorted(set(labels) - set(names)), matched),
    }


class _Units:
    """The images or videos of one data set, with the scores of every detector."""

    def __init__(self, matched: Matched, detectors: Sequence[Detector], dataset: str, level: str) -> None:
        keep = np.array([sample.dataset == dataset for sample in matched.samples])
        samples = [sample for sample, kept in zip(matched.samples, keep) if kept]
        scores = {path: values[keep] for path, values in matched.scores.items()}
        self.labels, self.groups = _labels_and_groups(samples, level)
        self.scores = {
            one.name: np.array([_level_scores(samples, scores[run.path], level) for run in one.runs])
            for one in detectors
        }

    def counts(self) -> dict[str, int]:
        fake = self.labels == 1
        return {
            "n_real": int((~fake).sum()),
            "n_fake": int(fake.sum()),
            "n_real_groups": len(set(self.groups[~fake])),
            "n_fake_groups": len(set(self.groups[fake])),
        }

    def part(self, a: str, b: str) -> Part:
        return Part(self.groups, self.labels, self.scores[a], self.scores[b])


def _labels_and_groups(samples: Sequence[Sample], level: str) -> tuple[np.ndarray, np.ndarray]:
    if level == "image":
        return np.array([s.label for s in samples]), np.array([s.group for s in samples])
    _, labels, _, groups = video_scores(samples, np.zeros(len(samples)))
    return labels, np.array(groups)


def _level_scores(samples: Sequence[Sample], scores: np.ndarray, level: str) -> np.ndarray:
    return scores if level == "image" else video_scores(samples, scores)[2]


def _pairs(detectors: Sequence[Detector], baseline: str | None) -> list[tuple[Detector, Detector]]:
    names = [one.name for one in detectors]
    if baseline is not None and baseline not in names:
        raise CompareError(f"baseline is {baseline!r}; it must be one of {', '.join(names)}")
    if baseline is None and len(detectors) <= MOST_PAIRS_OF:
        return list(combinations(detectors, 2))
    first = detectors[names.index(baseline) if baseline is not None else 0]
    return [(one, first) for one in detectors if one is not first]


def _compared(
    a: Detector, b: Detector, level: str, dataset: str, units: Sequence[_Units], variance: str, seed: int
) -> dict[str, Any]:
    paired = None not in a.seeds and a.seeds == b.seeds
    found = difference([unit.part(a.name, b.name) for unit in units], variance=variance, paired=paired, seed=seed)
    counts = [unit.counts() for unit in units]
    return {
        "a": a.name,
        "b": b.name,
        "level": level,
        "dataset": dataset,
        **{key: sum(one[key] for one in counts) for key in counts[0]},
        "auc_a": float(np.mean(found.auc_a)),
        "auc_b": float(np.mean(found.auc_b)),
        "difference": found.mean,
        "interval": found.interval(LEVEL),
        "p": found.p_value(),
        "error": found.error,
        "sources": [{"variance": one.variance, "freedom": one.freedom} for one in found.sources],
        "seeds": [len(a.runs), len(b.runs)],
        "paired_seeds": paired and len(a.runs) > 1,
        "per_seed": list(found.per_seed) if paired and len(a.runs) > 1 else None,
        "reason": found.reason,
        "p_holm": None,
        "interval_holm": None,
        "verdict": None,
        "found": found,
    }


def _judge(rows: Sequence[dict[str, Any]]) -> None:
    """Fill in what Holm's correction over these comparisons gives, and the verdicts."""
    p = {str(place): row["p"] for place, row in enumerate(rows)}
    adjusted, levels = holm_p_values(p), holm(p, LEVEL)
    for place, row in enumerate(rows):
        found: Difference = row["found"]
        if not found.sources:
            row["verdict"] = row["reason"]
            continue
        row["p_holm"], row["interval_holm"] = adjusted[str(place)], found.interval(levels[str(place)])
        better = row["a"] if row["difference"] > 0 else row["b"]
        row["verdict"] = f"{better} is better" if adjusted[str(place)] <= 1 - LEVEL else CANNOT


def _about(one: Detector, units: dict[tuple[str, str], _Units]) -> dict[str, Any]:
    """The runs of a detector, and the mean and standard deviation of its AUC over them."""
    auc: dict[str, dict[str, Any]] = {}
    for (level, name), unit in units.items():
        values = aucs(unit.labels, unit.scores[one.name]).tolist()
        auc.setdefault(level, {})[name] = {
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "per_seed": values,
        }
    runs = [{"name": run.name, "seed": seed, "sha256": file_sha256(run.path)} for run, seed in zip(one.runs, one.seeds)]
    return {"runs": runs, "auc": auc}


def _notes(detectors: Sequence[Detector], one_class: Sequence[str], matched: Matched) -> list[str]:
    notes = []
    if one_class:
        notes.append(f"not compared, because they hold one class only: {', '.join(one_class)}")
    if any(matched.left_out.values()):
        counts = ", ".join(f"{count:,} of {name}" for name, count in matched.left_out.items() if count)
        notes.append(f"{len(matched.samples):,} samples are in all runs and are compared; left out: {counts}")
    single = [one.name for one in detectors if len(one.runs) == 1]
    if len(single) == len(detectors):
        notes.append("one run each: the intervals hold for these runs on other videos, not for runs with other seeds")
    elif single:
        notes.append(f"one run: {', '.join(single)}; how much its training varies is unknown and not in the intervals")
    return notes
