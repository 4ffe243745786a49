"""The report of `masm eval` as one HTML page: tables, curves, and the worst errors as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from sklearn.metrics import roc_curve

from ..data.decode import UnreadableImage, read_image
from ..data.sample import Sample
from ..evaluation.metrics import CALIBRATION_BINS, METRICS, reliability
from .page import figure_svg, image_uri, render
from .plots import new_figure
from .protocol import protocol_heads, protocol_rows, protocol_warnings
from .tables import (
    calibrated_cell,
    format_cell,
    interval_of,
    leak_warnings,
    method_rows,
    opening_lines,
    shows_calibrated,
    shows_video_keys,
    video_key_cell,
)

#: Errors in the gallery, of each kind; longest side of a picture in pixels.
GALLERY, PICTURE = 8, 160
#: Methods with a curve of their own; with more, only the curve of all fakes is drawn.
_CURVES = 8
_REAL, _FAKE = "#0072b2", "#d55e00"


def evaluation_page(content: Mapping[str, Any], scored: Mapping[str, tuple[Sequence[Sample], np.ndarray]]) -> str:
    """The page for results.json and the samples and scores P(fake) [n] of each run, by its name."""
    by_key, calibrated = shows_video_keys(content["runs"]), shows_calibrated(content["runs"])
    runs = []
    for name, result in content["runs"].items():
        samples, scores = scored[name]
        parts = []
        for dataset, entry in result["datasets"].items():
            here = [i for i, sample in enumerate(samples) if sample.dataset == dataset]
            parts.append(_part(dataset, entry, [samples[i] for i in here], scores[here], by_key, calibrated))
        notes = opening_lines(name, result)
        runs.append({"name": name, "warnings": leak_warnings(name, result), "notes": notes, "parts": parts})
    return render(
        "evaluation.html",
        runs=runs,
        protocol=_protocol(content.get("protocol")),
        columns=_columns(by_key, calibrated),
        video_key=content["config"]["video_key"],
        provenance=content["provenance"],
        bins=CALIBRATION_BINS,
    )


def _protocol(protocol: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the template shows of a protocol."""
    if protocol is None:
        return None
    return {
        **{name: protocol[name] for name in ("name", "title", "source", "notes")},
        "heads": protocol_heads(protocol),
        "rows": protocol_rows(protocol),
        "warnings": protocol_warnings(protocol),
        "missing": list(protocol["missing"].values()),
    }


def _columns(by_key: bool, calibrated: bool) -> list[str]:
    titles = [metric.title for metric in METRICS.values() if metric.title is not None]
    other = [*(["cal. acc"] if calibrated else []), *(["dfb-compat AUC"] if by_key else [])]
    return ["forgery", "level", "real", "fake", "AUC", *titles, *other]


def _part(
    dataset: str,
    entry: Mapping[str, Any],
    samples: Sequence[Sample],
    scores: np.ndarray,
    by_key: bool,
    calibrated: bool,
) -> dict[str, Any]:
    """What the template shows of one data set."""
    rows = []
    for method, numbers in method_rows(entry).items():
        for level, prefix, suffix in (("image", "", ""), ("video", "video_", "_videos")):
            if level == "video" and _images_are_videos(numbers):
                continue  # every image is a video: the same numbers again
            cells = [format_cell((numbers.get(f"{prefix}{key}"), None, None)) for key, m in METRICS.items() if m.title]
            row = [method, level, f"{numbers[f'n_real{suffix}']:,}", f"{numbers[f'n_fake{suffix}']:,}"]
            row += [format_cell(interval_of(numbers, f"{prefix}auc")), *cells]
            if calibrated:  # the calibration is for videos
                of_videos = level == "video" or _images_are_videos(numbers)
                row.append(calibrated_cell(numbers) if of_videos else "")
            if by_key:
                row.append(video_key_cell(numbers) if level == "video" else "")
            rows.append(row)
    labels = np.array([sample.label for sample in samples])
    both = len(set(labels.tolist())) == 2
    return {
        "dataset": dataset,
        "rows": rows,
        "groups": (entry["all"]["n_real_groups"], entry["all"]["n_fake_groups"]),
        "figure": _figure(samples, labels, scores) if both else None,
        "galleries": [
            _gallery("Worst false alarms", "Real images with the highest P(fake)", samples, scores, 0),
            _gallery("Worst misses", "Fake images with the lowest P(fake)", samples, scores, 1),
        ],
    }


def _images_are_videos(numbers: Mapping[str, Any]) -> bool:
    return numbers["n_real_videos"] + numbers["n_fake_videos"] == numbers["n_real"] + numbers["n_fake"]


def _figure(samples: Sequence[Sample], labels: np.ndarray, scores: np.ndarray) -> Markup:
    """ROC curves, histogram and reliability diagram, by image."""
    figure, ((roc, histogram, reliable),) = new_figure(1, 3, (12, 3.9))
    _roc(roc, samples, labels, scores)
    bins = np.linspace(0, 1, 41)
    for label, name, color in ((0, "real", _REAL), (1, "fake", _FAKE)):
        own = scores[labels == label]
        histogram.hist(own, bins, weights=np.full(len(own), 1 / len(own)), alpha=0.55, color=color,
                       label=f"{name} (n = {len(own):,})")  # fmt: skip
    histogram.set(xlabel="P(fake)", ylabel="share of the images of a class", title="scores", xlim=(0, 1))
    histogram.legend(fontsize="small", frameon=False)
    _reliability(reliable, labels, scores)
    return figure_svg(figure)


def _roc(axes: Axes, samples: Sequence[Sample], labels: np.ndarray, scores: np.ndarray) -> None:
    methods = sorted({sample.method for sample in samples if sample.label == 1})
    reals = int((labels == 0).sum())
    for method in [*(methods if 1 < len(methods) <= _CURVES else []), None]:
        keep = np.array([s.label == 0 or method in (None, s.method) for s in samples])
        fpr, tpr, _ = roc_curve(labels[keep], scores[keep])
        name = method or (methods[0] if len(methods) == 1 else "all fakes")
        style = {"color": "black", "linewidth": 1.8} if method is None else {"linewidth": 1.0}
        axes.plot(fpr, tpr, label=f"{name} (n = {int(labels[keep].sum()):,})", **style)
    axes.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
    axes.annotate("chance", (0.52, 0.5), fontsize="small", color="grey", rotation=38, va="top")
    axes.set(
        xlabel=f"FPR (of {reals:,} real images)", ylabel="TPR", title="ROC", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01)
    )
    axes.legend(fontsize="x-small", frameon=False, loc="lower right")
    axes.grid(alpha=0.3)


def _reliability(axes: Axes, labels: np.ndarray, scores: np.ndarray) -> None:
    bins = [entry for entry in reliability(labels, scores) if entry[0]]
    axes.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
    axes.plot([mean for _, mean, _ in bins], [share for _, _, share in bins], "o-", color=_REAL, markersize=4)
    for count, mean, share in bins:
        axes.annotate(f"{count:,}", (mean, share), xytext=(0, 6 if share < 0.9 else -11), textcoords="offset points",
                      fontsize=6.5, ha="center", color="#444")  # fmt: skip
    axes.set(xlabel="mean P(fake) of a bin", ylabel="share of fakes in it", title=f"reliability (n = {len(labels):,})",
             xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))  # fmt: skip
    axes.grid(alpha=0.3)


def _gallery(title: str, about: str, samples: Sequence[Sample], scores: np.ndarray, label: int) -> dict[str, Any]:
    """The worst errors at 0.5, at most one of each video: pictures, and names of files that cannot be read."""
    wrong = [i for i, sample in enumerate(samples) if sample.label == label and (scores[i] >= 0.5) != bool(label)]
    wrong.sort(key=lambda i: (scores[i] if label else -scores[i], samples[i].path))
    worst: dict[str, int] = {}
    for i in wrong:
        worst.setdefault(samples[i].video, i)
    shown, unread = [], []
    for i in list(worst.values())[:GALLERY]:
        path = samples[i].path
        entry = {"score": f"{scores[i]:.3f}", "method": samples[i].method, "file": "/".join(PurePath(path).parts[-3:])}
        try:
            shown.append(entry | {"uri": image_uri(_small(read_image(path)))})
        except UnreadableImage:
            unread.append(entry)
    total = sum(sample.label == label for sample in samples)
    return {"title": title, "about": about, "wrong": len(wrong), "of": total, "shown": shown, "unread": unread}


def _small(rgb: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, 3], its longest side at most `PICTURE` pixels."""
    factor = PICTURE / max(rgb.shape[:2])
    if factor >= 1:
        return rgb
    height, width = (max(1, round(side * factor)) for side in rgb.shape[:2])
    return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
