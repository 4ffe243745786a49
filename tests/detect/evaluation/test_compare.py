"""Two sets of scores on the same samples."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.data.sample import Sample
from masm_detect.evaluation.compare import compare_scores


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


def test_compare():
    samples, scores = make()
    worse = np.random.default_rng(0).permutation(scores)
    result = compare_scores(samples, scores, worse)
    assert result["difference"] == pytest.approx(result["auc_a"] - result["auc_b"])
    assert result["difference_ci"][0] > 0
    assert compare_scores(samples, scores, scores)["difference_ci"] == [0, 0]
