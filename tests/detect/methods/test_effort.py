"""The layer of Effort against dense algebra."""

from __future__ import annotations

import pytest
import torch
from masm_detect.methods.effort import EffortLinear
from torch import nn


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_effort_layer_is_the_published_split(shape):
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0]).double()
    layer = EffortLinear.from_linear(linear)
    q = min(shape)
    sigma = torch.linalg.svdvals(linear.weight)
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight)[: q - 1], sigma[: q - 1])
    torch.testing.assert_close(layer.s, sigma[-1:])
    assert int(torch.linalg.matrix_rank(layer.weight)) == q - 1
    x = torch.randn(4, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))
    assert {name for name, _ in layer.named_parameters()} == {"u", "s", "v"}
