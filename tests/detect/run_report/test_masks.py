"""How often blocks were selected, against random selections."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from masm_detect.run_report.masks import mask_report, random_masks


def test_counts_of_masks_against_the_binomial_range(seed):
    random = np.random.default_rng(seed)
    S, L, K = 30, 12, 2
    masks = np.zeros((S, L, K))
    for step in range(S):  # subspace 1: always the same 3 layers; subspace 2: 6 random ones
        masks[step, :3, 0] = 0.5
        masks[step, random.permutation(L)[:6], 1] = 1
    history = [{"step": 10 * step, "mask": mask.tolist()} for step, mask in enumerate(masks)]
    report = mask_report(history, [f"l{i}" for i in range(L)], seed % 1000)
    assert report["density"] == [0.25, 0.5] and report["expected"] == [7.5, 15.0]
    assert [row[0] for row in report["counts"]] == [30] * 3 + [0] * 9
    for k, p in enumerate(report["density"]):
        share = np.cumsum([comb(S, n) * p**n * (1 - p) ** (S - n) for n in range(S + 1)])
        low, high = report["range"][k]
        assert share[low] >= 0.025 - 1e-12 and (low == 0 or share[low - 1] < 0.025)
        assert share[high] >= 0.975 - 1e-12 and share[high - 1] < 0.975
    low, high = report["range"][1]
    inside = [low <= row[1] <= high for row in report["counts"]]
    assert report["outside"] == pytest.approx((12 + inside.count(False)) / 24)
    drawn = np.array(report["random"]["mask"])
    assert (drawn.sum(1) == [3, 6]).all()  # the same density, each time
    assert report["changed"] == pytest.approx(np.abs(np.diff(masks > 0, axis=0)).mean())


def test_random_masks_fall_outside_their_range_as_often_as_they_should(seed):
    selected = np.zeros((40, 60, 20), dtype=bool)
    selected[:, :15] = True
    drawn = random_masks(selected, seed)
    assert (drawn.sum(1) == 15).all() and (random_masks(selected, seed) == drawn).all()
    history = [{"step": step, "mask": mask.tolist()} for step, mask in enumerate(drawn)]
    outside = mask_report(history, list(map(str, range(60))), seed + 1)["outside"]
    assert 0.005 < outside < 0.08  # at most 5% in expectation: a range of whole numbers holds more
    assert mask_report([], [], 0) is None
