"""Simulated scores of detectors of equal quality: videos of several frames, and errors that the detectors share."""

from __future__ import annotations

import numpy as np
from masm_detect.evaluation.differences import Part
from scipy.stats import norm


def draw_scores(rng, *, auc=0.8, groups=20, frames=4, detectors=2, seeds=1, shared=0.5, within=0.5, both=True, drift=0):
    """Names of groups [n], labels [n] and scores [detectors, seeds, n], all of the same expected AUC.

    Args:
        groups: of each class; with `both`, each group holds real and fake frames.
        frames: of a class in each group that has it.
        shared: share of the variance that all detectors and seeds have in common.
        within: share of the variance that the frames of a group have in common.
        drift: standard deviation over seeds of the distance between the classes.
    """
    names = np.arange(groups if both else 2 * groups)
    place = np.repeat(names, 2 * frames if both else frames)
    labels = np.tile(np.repeat([0, 1], frames), groups) if both else (place < groups).astype(int)

    def noise(*shape):
        of_group, own = rng.normal(size=(*shape, len(names))), rng.normal(size=(*shape, len(place)))
        return np.sqrt(within) * of_group[..., place] + np.sqrt(1 - within) * own

    scores = np.sqrt(shared) * noise() + np.sqrt(1 - shared) * noise(detectors, seeds)
    distance = norm.ppf(auc) * np.sqrt(2) + drift * rng.normal(size=(detectors, seeds, 1))
    return np.array([f"g{i}" for i in place]), labels, scores + distance * labels


def part_of(groups, labels, scores, a=0, b=1) -> Part:
    return Part(groups, labels, scores[a], scores[b])
