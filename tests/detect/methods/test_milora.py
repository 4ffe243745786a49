"""MiLoRA starts in the last singular directions of each weight."""

from __future__ import annotations

import pytest
import torch
from masm_detect.config import MethodConfig
from masm_detect.methods.build import build_method

pytest.importorskip("peft")


def test_factors_are_the_last_directions(tiny_detector):
    detector = tiny_detector()
    name = detector.backbone.linear_names("attention")[0]
    weight = detector.backbone.model.get_submodule(name).weight.detach().double().clone()
    build_method("milora", detector, MethodConfig(name="milora", rank=3), seed=0)
    layer = detector.backbone.model.get_submodule(name)
    product = (
        layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    left, sigma, right = torch.linalg.svd(weight)
    torch.testing.assert_close(product, (left[:, -3:] * sigma[-3:]) @ right[-3:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.base_layer.weight.double() + product, weight, rtol=0, atol=1e-6)
    assert not layer.base_layer.weight.requires_grad
