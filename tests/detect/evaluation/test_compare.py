"""Two sets of scores on the same samples."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.evaluation.compare import compare_scores
from scored_videos import make


def test_compare():
    samples, scores = make()
    worse = np.random.default_rng(0).permutation(scores)
    result = compare_scores(samples, scores, worse)
    assert result["difference"] == pytest.approx(result["auc_a"] - result["auc_b"])
    assert result["difference_ci"][0] > 0
    assert compare_scores(samples, scores, scores)["difference_ci"] == [0, 0]
