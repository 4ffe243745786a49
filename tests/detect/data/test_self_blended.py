"""Self-blended fakes come from real images only, and are the same in every run."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.config import DataConfig
from masm_detect.data.frames import frame_dataset
from masm_detect.data.sample import Sample
from masm_detect.data.self_blended import SELF_BLENDED, self_blended


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 255, (80, 80, 3), dtype=np.uint8) for name in ("r0", "r1", "f0")}


def samples():
    real = [Sample(f"r{i}", 0, "d", "real", f"d/real/{i}", "train") for i in range(2)]
    return [*real, Sample("f0", 1, "d", "swap", "d/swap/0", "train")]


def test_fakes_of_the_data_are_replaced():
    out = self_blended(samples())
    assert [(s.path, s.method, s.label) for s in out] == [
        *(("r0", "real", 0), ("r0", SELF_BLENDED, 1)),
        *(("r1", "real", 0), ("r1", SELF_BLENDED, 1)),
    ]
    assert out[0].group == out[1].group and out[0].video != out[1].video


def test_a_blend_changes_a_part_of_its_image_and_is_drawn_anew_each_epoch(images, tiny_detector):
    backbone = tiny_detector().backbone
    data = frame_dataset(self_blended(samples()), backbone, DataConfig(augment=None), seed=3, images=images)
    plain, blended = data[0]["image"], data[1]["image"]
    changed = (plain - blended).abs().amax(0) > 1e-4
    assert 0.02 < float(changed.float().mean()) < 1
    assert (data[1]["image"] == blended).all()
    data.set_epoch(1)
    assert not (data[1]["image"] == blended).all()
