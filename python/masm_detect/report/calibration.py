"""A calibration in words, and its reliability plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .plots import new_figure, save_figure

_BINS = 10


def calibration_lines(calibration: Any) -> list[str]:
    """What was learned, one sentence each; `calibration`: `evaluation.calibration.Calibration`."""
    c = calibration
    lines = [
        f"calibrated on {c.n_real} real and {c.n_fake} fake videos ({c.n_real_groups} and {c.n_fake_groups} "
        f"independent groups) of {', '.join(c.data) or 'unnamed data'}, AUC {c.auc:.3f}",
        f"expected calibration error {c.ece_before:.3f} before, {c.ece_after:.3f} after; the calibrated P(fake) holds "
        f"for a mixture with {c.share_of_fakes:.0%} fakes, as in this data",
    ]
    for name, side, rate, groups, wrong in (
        ("fake", "or higher", c.false_alarm_rate, c.n_real_groups, "real videos"),
        ("real", "or lower", c.miss_rate, c.n_fake_groups, "fake videos"),
    ):
        threshold = c.thresholds[name]
        if threshold is None:
            lines.append(
                f"likely {name}: never, because {groups} groups of {wrong} are too few for a rate of {rate:g} (it "
                f"needs {math.ceil(1 / rate) - 1})"
            )
        else:
            lines.append(
                f"likely {name}: calibrated P(fake) of {threshold:.3f} {side}; at most {rate:.0%} of {wrong} like "
                "these are called so by mistake"
            )
    return lines


def plot_reliability(labels: np.ndarray, scores: np.ndarray, calibration: Any, path: Path | str) -> Path:
    """Share of fakes against the predicted P(fake), before and after calibration, with the number of videos.

    Args:
        labels: 0 or 1, [V].
        scores: P(fake) of the videos before calibration, [V].
        calibration: `evaluation.calibration.Calibration`.
        path: the file.
    """
    after = np.array([calibration.probability(p) for p in scores])
    figure, ((axes, counts),) = new_figure(1, 2, (9.0, 4.2))
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1, label="perfect")
    for name, values, color in (("before", scores, "tab:orange"), ("after", after, "tab:blue")):
        place = np.minimum((values * _BINS).astype(int), _BINS - 1)
        used = np.unique(place)
        mean = [values[place == b].mean() for b in used]
        share = [labels[place == b].mean() for b in used]
        axes.plot(mean, share, "o-", color=color, label=name, markersize=4)
        counts.hist(values, bins=_BINS, range=(0, 1), histtype="step", color=color, label=name)
    for name, style in (("fake", "--"), ("real", "-.")):
        if (threshold := calibration.thresholds[name]) is not None:
            counts.axvline(threshold, color="black", linestyle=style, linewidth=1, label=f"likely {name} from here")
    axes.set(xlabel="predicted P(fake)", ylabel="share of fakes", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"Reliability, {len(labels)} videos, {_BINS} bins")
    counts.set(xlabel="predicted P(fake)", ylabel="videos", xlim=(0, 1), title="Number of videos")
    axes.legend(fontsize="small", frameon=False)
    counts.legend(fontsize="small", frameon=False)
    return save_figure(figure, path)
