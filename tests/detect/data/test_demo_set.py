"""The embedded demo set: reproducible, no photograph on two sides, real and fake through one chain."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from masm_detect.data import demo_set
from masm_detect.data.checks import check_samples
from masm_detect.data.decode import decode_image
from masm_detect.data.demo_set import (
    PHOTOGRAPHS,
    TRAIN_FAMILIES,
    DemoSetError,
    build_demo_set,
    draw_crop,
    load_photograph,
)
from masm_detect.data.forgeries import FAMILIES
from masm_detect.data.frames import FrameDataset
from masm_detect.data.transforms import ImageTransform

SIZES = {"train_crops": 96, "val_crops": 54, "test_crops": 42, "progress": False}


@pytest.fixture(scope="module")
def demo():
    return build_demo_set(**SIZES)


def test_counts_and_families(demo):
    check_samples(demo.samples)
    train, val, test = (demo.split(s) for s in ("train", "val", "test"))
    assert Counter(s.label for s in train) == {0: 48, 1: 48}
    assert Counter(s.method for s in train if s.label) == dict.fromkeys(TRAIN_FAMILIES, 16)
    assert {s.method for s in val} == {"real", *TRAIN_FAMILIES}
    assert Counter(s.method for s in test) == dict.fromkeys(("real", *FAMILIES), 42)
    assert set(demo.images) == {s.path for s in demo.samples}


def test_no_photograph_on_two_sides(demo):
    files = [file for part in PHOTOGRAPHS.values() for file in part]
    assert len(files) == len(set(files))
    assert not any("motorcycle_right" in name for _, name in files)  # the other half of a stereo pair that is used
    groups = [{s.group for s in demo.split(split)} for split in PHOTOGRAPHS]
    assert [len(g) for g in groups] == [len(part) for part in PHOTOGRAPHS.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_same_seed_same_bytes(demo):
    again, other = build_demo_set(**SIZES), build_demo_set(**SIZES, seed=1)
    assert again.samples == demo.samples
    assert all(np.array_equal(again.images[k], v) for k, v in demo.images.items())
    assert any(not np.array_equal(other.images[k], v) for k, v in demo.images.items())


def test_crops_do_not_depend_on_count_or_families(demo):
    fewer = build_demo_set(**SIZES | {"train_crops": 14, "test_crops": 4}, test_families=("warp",))
    for path, data in fewer.images.items():
        np.testing.assert_array_equal(data, demo.images[path])


def test_real_and_fake_share_the_chain(demo):
    """Quantisation tables (so the JPEG quality), size and pixels outside the forgery are those of the real twin."""
    for s in demo.split("test"):
        if s.label == 0:
            continue
        fake = demo.images[s.path].tobytes()
        real = demo.images[s.path.replace(f"fake-{s.method}", "real")].tobytes()
        tables = [data[: data.index(b"\xff\xda")] for data in (fake, real)]
        start = [t.index(b"\xff\xdb") for t in tables]
        assert tables[0][start[0] : start[0] + 130] == tables[1][start[1] : start[1] + 130]
        a, b = (decode_image(d, s.path).astype(int) for d in (fake, real))
        assert a.shape == b.shape == (224, 224, 3)
        assert np.abs(a - b).mean() > 0.3
        if s.method not in ("upsample",):
            # A part of the picture is the same but for JPEG. Not the half: a warp may bend more than that.
            assert np.quantile(np.abs(a - b), 0.3) <= 3


def test_forgeries_of_grey_photographs_stay_grey(demo):
    for s in demo.samples:
        if s.group.endswith(("brick", "camera", "gravel", "grass", "coins", "street", "im.001")):
            rgb = decode_image(demo.images[s.path], s.path).astype(int)
            assert np.abs(rgb - rgb[..., :1]).max() <= 2


def test_feeds_the_dataset(demo):
    dataset = FrameDataset(demo.samples, ImageTransform(112, (0.5,) * 3, (0.5,) * 3), images=demo.images)
    assert dataset[0]["image"].shape == (3, 112, 112) and dataset[1]["label"] == 1


def test_crop_is_never_enlarged():
    photograph = load_photograph("skimage", "data/chelsea.png")
    for seed in range(20):
        assert draw_crop(photograph, 288, np.random.default_rng(seed)).shape == (288, 288, 3)


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match="unknown forgery 'gan'"):
        build_demo_set(train_families=("gan",))
    with pytest.raises(ValueError, match="size must be in"):
        build_demo_set(size=512)
    with pytest.raises(ValueError, match="train_crops must be at least 2"):
        build_demo_set(train_crops=0)
    with pytest.raises(DemoSetError, match="does not ship it"):
        load_photograph("skimage", "data/nothing.png")
    monkeypatch.setattr(demo_set.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoSetError, match=r"pip install .masm_ext\[demo\]"):
        load_photograph("skimage", "data/coffee.png")
