"""Self-blended fakes come from real images only, and are the same in every run."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from masm_detect.config import DataConfig
from masm_detect.data.folders import read_folder
from masm_detect.data.frames import frame_dataset
from masm_detect.data.sample import DatasetError, Sample
from masm_detect.data.self_blended import SELF_BLENDED, is_self_blended, self_blended
from masm_detect.data.sources import source_splits


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


def test_training_data_of_a_folder(tmp_path):
    for i in range(6):
        for kind in ("real", "fake-self-blended"):
            file = tmp_path / "set" / kind / f"{kind}{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x")
    train, val = source_splits(DataConfig(paths=[str(tmp_path / "set")], self_blended=True, val_fraction=0.4))
    assert Counter((s.label, s.method) for s in (*train, *val)) == {(0, "real"): 6, (1, SELF_BLENDED): 6}
    assert not {s.group for s in train} & {s.group for s in val}
    # files of a folder of this name are fakes as they are
    assert not any(is_self_blended(s) for s in read_folder(tmp_path / "set"))


def test_a_small_image_is_named(tiny_detector):
    images = {"r0": np.zeros((40, 90, 3), np.uint8)}
    data = frame_dataset(self_blended(samples()[:1]), tiny_detector().backbone, DataConfig(), images=images)
    with pytest.raises(DatasetError, match=r"r0 has 90 x 40 pixels: data\.self_blended needs"):
        data[1]


def test_a_blend_changes_a_part_of_its_image_and_is_drawn_anew_each_epoch(images, tiny_detector):
    backbone = tiny_detector().backbone
    data = frame_dataset(self_blended(samples()), backbone, DataConfig(augment=None), seed=3, images=images)
    plain, blended = data[0]["image"], data[1]["image"]
    changed = (plain - blended).abs().amax(0) > 1e-4
    assert 0.02 < float(changed.float().mean()) < 1
    assert (data[1]["image"] == blended).all()
    data.set_epoch(1)
    assert not (data[1]["image"] == blended).all()
