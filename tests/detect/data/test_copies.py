"""Copies are found by content: between splits, between labels, recompressed, and in the cases that are no error."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
from masm_detect.config import DataConfig
from masm_detect.data.contents import read_contents
from masm_detect.data.copies import byte_copies, check_contents, near_copies
from masm_detect.data.sample import DatasetError
from masm_detect.data.sources import read_dataset, read_splits
from masm_detect.training.run import train
from pictures import write_picture
from tiny import run_config


@pytest.fixture
def divided(tmp_path):
    """`train/`, `val/` and `test/` with four reals and four fakes each, all different."""
    names = [(split, kind, i) for split in ("train", "val", "test") for kind in ("real", "fake-x") for i in range(4)]
    for seed, (split, kind, i) in enumerate(names):
        write_picture(tmp_path / "set" / split / kind / f"{split}-{kind}-{i}.jpg", seed)
    return tmp_path / "set"


def check(folder: Path) -> list[str]:
    """The warnings of `check_contents`."""
    samples = read_dataset(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_contents(samples, read_contents(samples))
    return [str(warning.message) for warning in caught]


def test_different_pictures_are_no_copies(divided):
    assert check(divided) == []


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_same_bytes_in_two_splits(divided, split):
    shutil.copy(divided / "train/real/train-real-1.jpg", divided / split / "real/other name.jpg")
    with pytest.raises(DatasetError, match=rf"a file is in two splits.*{split}/real/other name.jpg") as error:
        check(divided)
    assert "train/real/train-real-1.jpg" in str(error.value)
    shutil.copy(divided / "train/real/train-real-2.jpg", divided / split / "real/second.jpg")
    with pytest.raises(DatasetError, match="2 files are in two splits"):
        check(divided)


def test_the_same_bytes_under_two_labels(divided):
    shutil.copy(divided / "train/real/train-real-1.jpg", divided / "train/fake-x/one.jpg")
    with pytest.raises(DatasetError, match=r"labelled both real and fake .*one.jpg is fake") as error:
        check(divided)
    assert "train-real-1.jpg is real" in str(error.value)


def test_the_same_bytes_twice_in_one_split_are_a_warning(divided):
    for i in (1, 2):
        shutil.copy(divided / f"train/real/train-real-{i}.jpg", divided / f"train/real/copy of {i}.jpg")
    shutil.copy(divided / "train/real/train-real-1.jpg", divided / "train/real/third.jpg")
    [text] = check(divided)
    assert text.startswith("3 files are copies, byte for byte") and "they count twice" in text


def test_an_undivided_set_beside_a_test_split(divided, tmp_path):
    """As when `masm eval` gets both: both are tested, and nothing leaks."""
    undivided = tmp_path / "more" / "real" / "one.jpg"
    undivided.parent.mkdir(parents=True)
    shutil.copy(divided / "test/real/test-real-1.jpg", undivided)
    shutil.copytree(divided / "test/fake-x", tmp_path / "more" / "fake-y")
    samples = [s for s in read_dataset(divided) if s.split == "test"] + read_dataset(tmp_path / "more")
    with pytest.warns(UserWarning, match="5 files are copies"):
        check_contents(samples, read_contents(samples))
    # but a file in training and in the test is a leak, wherever else it is
    shutil.copy(undivided, divided / "train/real/again.jpg")
    samples = read_dataset(tmp_path / "more") + read_dataset(divided)
    with pytest.raises(DatasetError, match="a file is in two splits"):
        check_contents(samples, read_contents(samples))


@pytest.mark.parametrize(("side", "quality"), [(96, 50), (144, 80), (64, 75)])
def test_a_recompressed_copy_in_another_split_is_a_warning(divided, side, quality):
    for seed in (1, 2):
        write_picture(divided / f"test/real/renamed{seed}.jpg", seed, side, quality)
    [text] = check(divided)
    assert text.startswith("2 pictures of the test split look like pictures of the train split in another group, e.g.")
    assert "renamed" in text and "train-real" in text
    write_picture(divided / "test/fake-x/made of a real one.jpg", 3, side, quality)
    assert check(divided)[0].startswith("3 pictures of the test split") and "(1 of them a real" in check(divided)[0]


def test_near_copies_of_one_group_are_left_out(divided):
    write_picture(divided / "train/fake-x/train-real-1.jpg", 1, quality=60)  # the name joins it with the real one
    alike = {"real/elsewhere.jpg", "real/train-real-1.jpg", "fake-x/train-real-1.jpg"}
    for copies in (0, 1):
        if copies:
            write_picture(divided / "train/real/elsewhere.jpg", 1, quality=40)
        samples = read_dataset(divided)
        pairs = near_copies(samples, read_contents(samples), range(len(samples)), range(len(samples)))
        names = {tuple("/".join(Path(samples[i].path).parts[-2:]) for i in pair) for pair in pairs}
        assert {a for a, _ in names} == (alike if copies else set())
        assert {b for a, b in names if "elsewhere" not in a} == ({"real/elsewhere.jpg"} if copies else set())


def test_self_blended_images_are_no_copies(tmp_path, tiny_data):
    splits = read_splits(DataConfig(paths=[str(tiny_data)], self_blended=True))
    samples = [*splits["train"], *splits["val"]]
    assert byte_copies(samples, read_contents(samples)) == []
    check_contents(samples, read_contents(samples))


def test_training_stops_before_it_begins(tiny_data, tiny_backbone, tmp_path):
    """Six copies under other names. The random split puts some of them into validation."""
    for i in range(6):
        shutil.copy(tiny_data / "real" / f"{i:02d}.png", tiny_data / "real" / f"copy of {i}.png")
    with pytest.raises(DatasetError, match=r"in two splits, byte for byte: .* is in 'train' and .* in 'val'"):
        train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe"))
    assert not (tmp_path / "run").exists()


def test_training_compares_with_the_test_split(tiny_data, tiny_backbone, tmp_path):
    for kind in ("real", "fake-stripes"):
        for index in range(12):
            split = "train" if index < 6 else "val" if index < 9 else "test"
            (tmp_path / "set" / split / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny_data / kind / f"{index:02d}.png", tmp_path / "set" / split / kind)
    shutil.copy(tiny_data / "real/03.png", tmp_path / "set/test/real/renamed.png")
    with pytest.raises(DatasetError, match=r"03.png is in 'train' and .*renamed.png in 'test'"):
        train(run_config(tmp_path / "set", tiny_backbone, tmp_path / "run", "probe"))
