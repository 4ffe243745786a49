"""The numbers of each cell, beside those of the clean images, and their means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from masm_detect.data.sample import Sample
from masm_detect.distortions.registry import DEEPER, DISTORTIONS, Cell
from masm_detect.evaluation.calibration import Calibration
from masm_detect.evaluation.differences import Part, difference
from masm_detect.evaluation.metrics import CallsFake, evaluate_scores, video_scores

#: What is taken from `evaluate_scores`, by image and, with video_ before it, by video.
_NUMBERS = ("auc", "auc_ci", "tpr_at_1fpr", "accuracy")
_COUNTS = ("n_real", "n_fake", "n_real_videos", "n_fake_videos", "n_real_groups", "n_fake_groups")


@dataclass
class CellScores:
    """The scores of one data set in one cell.

    Attributes:
        cell: the distortion
        scores: P(fake) of each scored image, by its key
        samples: its sample
        wanted: key -> sample of the images that were to be scored
        lost: reason -> number of images
        skipped: reason -> number of images that the distortion does not apply to
        unchanged: scored images in which it changed no pixel
        files_lost: reason -> number of files of which no frame could be read
    """

    cell: Cell
    scores: dict[Any, float] = field(default_factory=dict)
    samples: dict[Any, Sample] = field(default_factory=dict)
    wanted: dict[Any, Sample] = field(default_factory=dict)
    lost: Counter = field(default_factory=Counter)
    skipped: Counter = field(default_factory=Counter)
    unchanged: int = 0
    files_lost: Counter = field(default_factory=Counter)

    def arrays(self, keys: Iterable[Any] | None = None) -> tuple[list[Sample], np.ndarray]:
        """Samples and P(fake) [n] of all keys, or of `keys`."""
        keys = list(self.scores if keys is None else keys)
        return [self.samples[key] for key in keys], np.array([self.scores[key] for key in keys])


def measure_cells(cells: Sequence[CellScores], calibration: Calibration | None) -> dict[str, Any]:
    """What robustness.json holds of one data set.

    Args:
        cells: the clean cell first.
        calibration: of the run; None: it has none.

    Returns:
        {"cells": one entry for each cell, "overall": their means}.
    """
    clean, *distorted = cells
    entries = [_entry(one, clean, calibration) for one in cells]
    return {"cells": entries, "overall": _overall(entries, distorted, clean)}


def _entry(own: CellScores, clean: CellScores, calibration: Calibration | None) -> dict[str, Any]:
    cell, videos = own.cell, {sample.video for sample in own.wanted.values()}
    scored_videos = {sample.video for sample in own.samples.values()}
    common = [key for key in own.scores if key in clean.scores]
    entry: dict[str, Any] = {
        "cell": cell.name,
        "distortion": cell.distortion.name if cell.distortion else "clean",
        "level": cell.level,
        "value": cell.value,
        "text": cell.text,
        "suite": cell.distortion.suite if cell.distortion else None,
        "wanted": len(own.wanted),
        "scored": len(own.scores),
        "coverage": len(own.scores) / len(own.wanted) if own.wanted else None,
        "videos_wanted": len(videos) + own.files_lost.total(),
        "videos_scored": len(scored_videos),
        "unchanged": own.unchanged,
        "lost": dict(own.lost.most_common()),
        "skipped": dict(own.skipped.most_common()),
        "files_lost": dict(own.files_lost.most_common()),
        **_numbers(*own.arrays(), _calls_fake(calibration)),
    }
    if cell.distortion is not None:
        entry["difference"], entry["video_difference"] = _differences(own, clean, common)
        entry["flips"] = _flips(own, clean, calibration)
    entry["counts"] = changes(entry)
    return entry


def changes(entry: Mapping[str, Any]) -> bool:
    """Whether a cell counts in the means: it has an AUC, and its distortion changed a pixel."""
    distorted = entry["distortion"] != "clean"
    return distorted and entry["auc"] is not None and entry["unchanged"] < entry["scored"]


def _calls_fake(calibration: Calibration | None) -> CallsFake | None:
    """The decision at the calibrated threshold; None: there is none."""
    return None if calibration is None or calibration.thresholds["fake"] is None else calibration.calls_fake


def _numbers(samples: list[Sample], scores: np.ndarray, calls_fake: CallsFake | None) -> dict[str, Any]:
    names = [*_COUNTS, *_NUMBERS, *(f"video_{name}" for name in _NUMBERS), "video_accuracy_calibrated"]
    if len({sample.label for sample in samples}) < 2:  # losses may leave one class
        return {**dict.fromkeys(names), "n_real": sum(s.label == 0 for s in samples),
                "n_fake": sum(s.label == 1 for s in samples), "methods": {}}  # fmt: skip
    [entry] = evaluate_scores(samples, scores, calls_fake=calls_fake)["datasets"].values()
    methods = {name: {"auc": one["auc"], "auc_ci": one["auc_ci"]} for name, one in entry["methods"].items()}
    return {**{name: entry["all"][name] for name in names}, "methods": methods}


def _part(own: CellScores, clean: CellScores, common: Sequence[Any], by_video: bool) -> Part | None:
    """The images that both have, or the videos of these; None: of one class only."""
    samples, a = own.arrays(common)
    b = clean.arrays(common)[1]
    if len({sample.label for sample in samples}) < 2:
        return None
    if not by_video:
        labels = np.array([sample.label for sample in samples])
        return Part(np.array([sample.group for sample in samples]), labels, a[None], b[None])
    _, labels, mean_a, groups = video_scores(samples, a)
    return Part(np.array(groups), labels, mean_a[None], video_scores(samples, b)[2][None])


def _differences(own: CellScores, clean: CellScores, common: Sequence[Any]) -> list[dict[str, Any] | None]:
    """AUC of the cell minus AUC of the clean images, on the images that both have: by image, and by video."""
    parts = (_part(own, clean, common, by_video) for by_video in (False, True))
    return [None if part is None else _difference([part], len(part.labels)) for part in parts]


def _difference(parts: Sequence[Part], n: int) -> dict[str, Any]:
    found = difference(parts)
    return {
        "n": n,
        "auc": found.auc_a[0],
        "clean_auc": found.auc_b[0],
        "difference": found.mean,
        "ci": found.interval(),
        "reason": found.reason,
    }


def _flips(own: CellScores, clean: CellScores, calibration: Calibration | None) -> dict[str, Any]:
    """How many videos get another verdict than without distortion: of the calibration, or fake from 0.5 on."""

    def verdicts(cell: CellScores) -> dict[str, str]:
        if not cell.scores:
            return {}
        keys, _, scores, _ = video_scores(*cell.arrays())
        if calibration is None:
            return {key: "fake" if score >= 0.5 else "real" for key, score in zip(keys, scores)}
        return {key: calibration.verdict(float(score)) for key, score in zip(keys, scores)}

    mine, theirs = verdicts(own), verdicts(clean)
    both = [video for video in mine if video in theirs]
    flips = Counter(f"{theirs[video]} -> {mine[video]}" for video in both if mine[video] != theirs[video])
    return {
        "videos": len(both),
        "flipped": flips.total(),
        "share": flips.total() / len(both) if both else None,
        "kinds": dict(flips.most_common()),
    }


def _overall(entries: Sequence[Mapping[str, Any]], cells: Sequence[CellScores], clean: CellScores) -> dict[str, Any]:
    by_name = {cell.cell.name: cell for cell in cells}
    counted = [entry for entry in entries if entry["counts"]]
    distorted = [entry for entry in entries if entry["distortion"] != "clean"]
    wanted = sum(entry["wanted"] for entry in distorted)
    worst = min(counted, key=lambda entry: entry["auc"], default=None)
    levels = sum(len(one.levels) for one in DISTORTIONS.values() if one.suite == DEEPER)
    return {
        "clean_coverage": entries[0]["coverage"],
        "coverage": sum(entry["scored"] for entry in distorted) / wanted if wanted else None,
        "all": _mean(counted, by_name, clean, len(distorted)),
        "deeperforensics": _mean([e for e in counted if e["suite"] == DEEPER], by_name, clean, levels),
        "worst": None if worst is None else {"cell": worst["cell"], "auc": worst["auc"], "auc_ci": worst["auc_ci"]},
    }


def _mean(
    entries: Sequence[Mapping[str, Any]], cells: Mapping[str, CellScores], clean: CellScores, of: int
) -> dict[str, Any] | None:
    """Means over cells; None without a cell. The difference has an interval over groups, as of one cell."""
    if not entries:
        return None
    found: dict[str, Any] = {"cells": len(entries), "of": of}
    for prefix, by_video in (("", False), ("video_", True)):
        parts = [
            _part(own, clean, [key for key in own.scores if key in clean.scores], by_video)
            for own in (cells[entry["cell"]] for entry in entries)
        ]
        known = [part for part in parts if part is not None]
        aucs = [entry[f"{prefix}auc"] for entry in entries if entry[f"{prefix}auc"] is not None]
        found[f"{prefix}auc"] = float(np.mean(aucs)) if aucs else None
        found[f"{prefix}difference"] = _difference(known, len(known)) if known else None
    return found
