"""How far the weights of adapted layers moved."""

from __future__ import annotations

import pytest
import torch
from masm_detect.methods.effort import EffortLinear
from masm_detect.methods.layers import WeightDrift
from torch import nn


def test_weight_drift_is_the_dense_norm():
    torch.manual_seed(0)
    layer = EffortLinear.from_linear(nn.Linear(9, 6), rank=2)
    model = nn.Sequential(layer)
    start = layer.current_weight().detach().double().clone()
    drift = WeightDrift(model)
    assert drift.ratios()["0"] < 1e-7
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = float((layer.current_weight().double() - start).norm() / start.norm())
    assert drift.ratios()["0"] == pytest.approx(expected, rel=1e-5)
