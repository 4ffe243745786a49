"""Data sets in plain folders."""

from __future__ import annotations

import pytest
from masm_detect.config import DataConfig
from masm_detect.data.checks import check_samples
from masm_detect.data.folders import read_folder
from masm_detect.data.sample import DatasetError
from masm_detect.data.sources import read_dataset, source_splits


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_folder(tmp_path):
    for name in (
        "real/v1/2.png",
        "real/v1/10.png",
        "real/loose_3.jpg",
        "fake-GAN/v1/0.png",
        "fake-GAN/.hidden",
    ):
        touch(tmp_path / "set" / name)
    samples = read_dataset(tmp_path / "set")
    assert [(s.label, s.method, s.video) for s in samples] == [
        (1, "GAN", "set/fake-GAN/v1"), (0, "real", "set/real/loose_3"),
        (0, "real", "set/real/v1"), (0, "real", "set/real/v1"),
    ]  # fmt: skip
    assert [s.path.rsplit("/", 1)[1] for s in samples[2:]] == ["2.png", "10.png"]
    with pytest.raises(DatasetError, match="does not match the image name"):
        read_folder(tmp_path / "set", video_pattern=r"(\d+)")
    assert "set/real/loose" in {s.video for s in read_folder(tmp_path / "set", video_pattern=r"(.+)_\d+$")}


def test_folder_with_splits_and_pairs(tmp_path):
    for name in (
        "train/real/183/0.png",
        "train/fake-DF/183_253/0.png",
        "test/real/585/0.png",
        "test/fake-DF/585_599/0.png",
    ):
        touch(tmp_path / name)
    samples = read_folder(tmp_path, dataset="ff")
    assert {(s.split, s.group) for s in samples} == {
        ("train", "ff/pair/183_253"),
        ("test", "ff/pair/585_599"),
    }
    check_samples(samples)


def test_equal_names_over_splits_are_a_leak(tmp_path):
    for name in ("train/real/0.png", "train/fake-x/1.png", "test/real/2.png", "test/fake-x/0.png"):
        touch(tmp_path / "set" / name)
    with pytest.raises(DatasetError, match=r"'set/name/0' in .*other pictures other names"):
        check_samples(read_folder(tmp_path / "set"))


def test_bad_folders(tmp_path):
    with pytest.raises(DatasetError, match="found none"):
        read_folder(tmp_path)
    touch(tmp_path / "fakes" / "0.png")
    with pytest.raises(DatasetError, match=r"expected only folders real/ and fake-<method>/, found \['fakes'\]"):
        read_folder(tmp_path)
    (tmp_path / "fakes").rename(tmp_path / "fake-x")
    touch(tmp_path / "fake-x" / "clip.mp4")
    with pytest.raises(DatasetError, match="run `masm prepare` first"):
        read_folder(tmp_path)
    (tmp_path / "fake-x" / "clip.mp4").rename(tmp_path / "fake-x" / "notes.txt")
    with pytest.warns(UserWarning, match=r"1 files are not images.*notes.txt"):
        assert len(read_folder(tmp_path)) == 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "is not a regular expression"), (r"\w+", "has no group"), (r"x(.)", "does not match")],
)
def test_a_bad_video_pattern_is_explained(tmp_path, pattern, message):
    touch(tmp_path / "real" / "v_0.png")
    with pytest.raises(DatasetError, match=message):
        read_folder(tmp_path, video_pattern=pattern)


def test_the_pattern_reaches_training(tmp_path):
    for i in range(4):
        for frame in range(2):
            touch(tmp_path / "set" / "real" / f"r{i}_{frame}.png")
            touch(tmp_path / "set" / "fake-x" / f"f{i}_{frame}.png")
    train, val = source_splits(DataConfig(paths=[str(tmp_path / "set")], video_pattern=r"(.+)_\d+", val_fraction=0.5))
    assert len({s.video for s in (*train, *val)}) == 8
    assert not {s.video for s in train} & {s.video for s in val}
