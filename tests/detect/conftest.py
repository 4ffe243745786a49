"""Fixtures shared by the tests of masm_detect."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def tiny_detector():
    """Factory of a random two-block DINOv2 detector of width 16, patches of 14 px, 28 px images; same seed, same
    weights.
    """
    from masm_detect.models.backbone import Backbone
    from masm_detect.models.detector import Detector
    from transformers import Dinov2Config, Dinov2Model

    def build(seed: int = 0):
        config = Dinov2Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            patch_size=14,
            image_size=28,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Detector(Backbone(Dinov2Model(config)))

    return build


@pytest.fixture
def tiny_data(tmp_path):
    """Folder with `real/` and `fake-stripes/`, 12 images of 28 px each: noise, and noise with stripes that can be
    learned.
    """
    import cv2
    import numpy as np

    random = np.random.default_rng(0)
    for kind in ("real", "fake-stripes"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for index in range(12):
            image = random.integers(60, 200, (28, 28, 3), dtype=np.uint8)
            if kind != "real":
                image[:, ::4] = 255
            assert cv2.imwrite(str(tmp_path / "data" / kind / f"{index:02d}.png"), image)
    return tmp_path / "data"


@pytest.fixture
def tiny_backbone(tmp_path, tiny_detector):
    """Local folder, in Hugging Face layout, with the backbone of `tiny_detector`."""
    folder = tmp_path / "backbone"
    tiny_detector().backbone.model.save_pretrained(folder)
    return folder
