"""A calibration in words, and its reliability plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.score_file import log_odds, sigmoid
from .plots import new_figure, save_figure

_BINS = 10


#: Verdicts of the thresholds.
NAMES = {"fake": "likely fake", "real": "likely real, as far as this detector can tell"}


def promise(rate: float, limit: float, wrong: str) -> str:
    """What a threshold promises for videos like those it was learned on."""
    return (
        f"on average over such calibrations at most {100 * rate:.3g}% of {wrong} like these are called so by mistake, "
        f"and with this one less than about {100 * limit:.0f}% (with 95% confidence)"
    )


def _too_few(groups: int, what: str, rate: float) -> str:
    return f"{groups} groups of {what} are too few for a rate of {rate:g} (it needs {math.ceil(1 / rate) - 1})"


def calibration_lines(calibration: Any) -> list[str]:
    """What was learned, one sentence each; `calibration`: `evaluation.calibration.Calibration`."""
    c = calibration
    lines = [
        f"calibrated on {c.n_real} real and {c.n_fake} fake videos ({c.n_real_groups} and {c.n_fake_groups} "
        f"independent groups) of {', '.join(c.data) or 'unnamed data'}, AUC {c.auc:.3f}",
        f"expected calibration error {c.ece_before:.3f} before, {c.ece_after:.3f} after; the calibrated P(fake) is "
        "that in a mixture of as many real as fake videos: 0.5 says nothing",
    ]
    for name, side, rate, groups, wrong in (
        ("fake", "or higher", c.false_alarm_rate, c.n_real_groups, "real videos"),
        ("real", "or lower", c.miss_rate, c.n_fake_groups, "fake videos"),
    ):
        threshold = c.thresholds[name]
        if threshold is None:
            lines.append(f"{NAMES[name]}: never, because {_too_few(groups, wrong, rate)}")
        else:
            lines.append(
                f"{NAMES[name]}: calibrated P(fake) of {threshold:.3f} {side}; "
                f"{promise(rate, c.rate_limit(name), wrong)}"
            )
    if c.farthest is None:
        few = _too_few(min(c.n_real_groups, c.n_fake_groups), "videos", c.outside_rate)
        lines.append(f"unlike this data: never noticed, because {few}")
    else:
        lines.append(
            f"unlike this data: a mean distance of {c.farthest:.3f} or more to the nearest images; about "
            f"{100 * c.outside_rate:.3g}% of videos like these are as far"
        )
    if c.selected_on:
        lines.append(
            "the epoch of the run was chosen on this data, so that these rates are estimates and no guarantees: "
            "calibrate on data that was not used at all (--data)"
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
    # in the mixture of these videos, as the share of fakes is
    shift = log_odds(calibration.share_of_fakes)
    after = np.array([sigmoid(log_odds(calibration.probability(p)) + shift) for p in scores])
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
            threshold = sigmoid(log_odds(threshold) + shift)
            counts.axvline(threshold, color="black", linestyle=style, linewidth=1, label=f"likely {name} from here")
    axes.set(xlabel="predicted P(fake)", ylabel="share of fakes", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"Reliability, {len(labels)} videos, {_BINS} bins")
    counts.set(xlabel="predicted P(fake)", ylabel="videos", xlim=(0, 1), title="Number of videos")
    axes.legend(fontsize="small", frameon=False)
    counts.legend(fontsize="small", frameon=False)
    return save_figure(figure, path)
