"""DeLong's covariance and its clustered analogue, against their definitions over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.evaluation.delong import aucs, clustered_delong, delong, placements
from sklearn.metrics import roc_auc_score


def draw(seed, n=60, k=3):
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 0, 1, 1, rng.integers(0, 2, n)]
    scores = np.round(rng.normal(size=(k, len(labels))) + labels, 1)  # rounded: ties
    return rng, labels, scores


def kernel(labels, scores):
    """[fakes, reals]: 1 where the fake is above the real, one half where they are equal."""
    x, y = scores[labels == 1][:, None], scores[labels == 0][None]
    return (x > y) + 0.5 * (x == y)


def test_placements_count_all_pairs(seed):
    _, labels, scores = draw(seed)
    of_fakes, of_reals = placements(labels, scores)
    for row, fakes, reals in zip(scores, of_fakes, of_reals):
        pairs = kernel(labels, row)
        assert fakes == pytest.approx(pairs.mean(axis=1)) and reals == pytest.approx(pairs.mean(axis=0))
    assert aucs(labels, scores) == pytest.approx([roc_auc_score(labels, row) for row in scores])


def test_delong_by_its_definition(seed):
    _, labels, scores = draw(seed)
    found, covariance = delong(labels, scores)
    pairs = [kernel(labels, row) for row in scores]
    m, n = pairs[0].shape
    for i, one in enumerate(pairs):
        for j, other in enumerate(pairs):
            v10 = ((one.mean(1) - found[i]) * (other.mean(1) - found[j])).sum() / (m - 1) / m
            v01 = ((one.mean(0) - found[i]) * (other.mean(0) - found[j])).sum() / (n - 1) / n
            assert covariance[i, j] == pytest.approx(v10 + v01)


def test_a_group_of_one_sample_each_is_delong(seed):
    _, labels, scores = draw(seed)
    names = [f"g{i}" for i in range(len(labels))]
    for plain, clustered in zip(delong(labels, scores), clustered_delong(names, labels, scores)):
        assert clustered == pytest.approx(plain)


def test_clustered_delong_by_its_definition(seed):
    """Obuchowski (1997), equations for S10, S01 and S11, summed group by group."""
    rng, labels, scores = draw(seed)
    groups = rng.integers(0, 9, len(labels))
    groups[:4] = [20, 21, 22, 23]  # some groups hold one class only
    found, covariance = clustered_delong(groups.astype(str), labels, scores)
    fake, names = labels == 1, np.unique(groups)
    m, n, total = fake.sum(), (~fake).sum(), len(names)
    i10, i01 = len(np.unique(groups[fake])), len(np.unique(groups[~fake]))
    pairs = [kernel(labels, row) for row in scores]
    for i, one in enumerate(pairs):
        for j, other in enumerate(pairs):
            s10 = s01 = s11 = s11_other = 0.0
            for name in names:
                x, y = groups[fake] == name, groups[~fake] == name
                fakes = [p.mean(1)[x].sum() - x.sum() * a for p, a in ((one, found[i]), (other, found[j]))]
                reals = [p.mean(0)[y].sum() - y.sum() * a for p, a in ((one, found[i]), (other, found[j]))]
                s10, s01 = s10 + fakes[0] * fakes[1], s01 + reals[0] * reals[1]
                s11, s11_other = s11 + fakes[0] * reals[1], s11_other + reals[0] * fakes[1]
            expected = i10 / (i10 - 1) * s10 / m**2 + i01 / (i01 - 1) * s01 / n**2
            expected += total / (total - 1) * (s11 + s11_other) / (m * n)
            assert covariance[i, j] == pytest.approx(expected)
