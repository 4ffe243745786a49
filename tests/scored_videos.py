"""Samples of videos with scores, as a detector might give them."""

from __future__ import annotations

import numpy as np
from masm_detect.data.sample import Sample
from masm_detect.evaluation.metrics import evaluate_scores


def make(n_videos=40, frames=5, methods=("A", "B"), dataset="D", shift=0.15, noise=0.1, seed=0):
    """Real videos and as many fakes of each method; frames of a video share an offset, fakes are shifted up."""
    rng = np.random.default_rng(seed)
    samples, scores = [], []
    for method in ("real", *methods):
        label = int(method != "real")
        for v in range(n_videos):
            offset = rng.normal(0.4 + shift * label, noise)
            for f in range(frames):
                folder = f"fake-{method}" if label else "real"
                path, video = f"{dataset}/{folder}/{v}/{f}.png", f"{dataset}/{folder}/{v}"
                samples.append(Sample(path, label, dataset, method, video, "test", f"{dataset}/{v}"))
                scores.append(np.clip(offset + rng.normal(0, 0.05), 0, 1))
    return samples, np.round(scores, 2)  # rounded: ties


def small_result() -> dict:
    """The evaluation of eight real images and eight of each of two forgeries, four groups each."""
    kinds = [(method, number) for method in ("real", "a", "b") for number in range(8)]
    samples = [Sample(f"{m}{i}", int(m != "real"), "set", m, f"set/{m}/{i // 2}") for m, i in kinds]
    return {"method": "probe", **evaluate_scores(samples, np.random.default_rng(0).random(len(samples)))}
