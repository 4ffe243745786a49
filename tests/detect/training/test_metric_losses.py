"""Losses on features, against their definitions pair by pair."""

from __future__ import annotations

from itertools import combinations
from math import exp, log

import pytest
import torch
from masm_detect.training.metric_losses import alignment_loss, uniformity_loss


def by_pairs(features, labels):
    unit = [f / f.norm() for f in features.double()]
    squared = {(i, j): float((unit[i] - unit[j]).square().sum()) for i, j in combinations(range(len(unit)), 2)}
    same = [d for (i, j), d in squared.items() if labels[i] == labels[j]]
    return sum(same) / len(same), log(sum(exp(-2 * d) for d in squared.values()) / len(squared))


def test_losses_are_the_means_over_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(7, 5, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    alignment, uniformity = by_pairs(features.detach(), labels)
    assert float(alignment_loss(features, labels).detach()) == pytest.approx(alignment, abs=1e-5)
    assert float(uniformity_loss(features).detach()) == pytest.approx(uniformity, abs=1e-5)
    (alignment_loss(features, labels) + uniformity_loss(features)).backward()
    assert features.grad.isfinite().all() and features.grad.abs().sum() > 0


def test_batches_without_a_pair_have_no_loss():
    assert float(alignment_loss(torch.randn(2, 3), torch.tensor([0, 1]))) == 0
    assert float(uniformity_loss(torch.randn(1, 3))) == 0
