"""DeepfakeBench JSON files: read, written, and refused."""

from __future__ import annotations

import json
import re

import pytest
from masm_detect.data.checks import check_samples
from masm_detect.data.crop_recipe import CropRecipe, write_recipe
from masm_detect.data.deepfakebench import label_of, read_deepfakebench, write_deepfakebench
from masm_detect.data.sample import DatasetError, Sample
from masm_detect.data.sources import read_dataset


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def sample(path="a", label=0, split="", group="", video="d/real/v"):
    return Sample(path, label, "d", "m" if label else "real", video, split, group)


def ffpp(tmp_path, frames=("000.png", "010.png", "009.png")):
    """A small FaceForensics++ JSON: originals 000 and 003, their DF and NT fakes, another original 005."""
    tree = {"FaceForensics++": {}}
    for label, videos in (
        ("FF-real", ("000", "003", "005")),
        ("FF-DF", ("000_003", "003_000")),
        ("FF-NT", ("000_003",)),
    ):
        records = {}
        for video in videos:
            names = [f"ff/{label}/c23/{video}/{f}" for f in frames]
            [touch(tmp_path / n) for n in names]
            records[video] = {"label": label, "frames": names}
        tree["FaceForensics++"][label] = {"train": {"c23": records}, "val": {"c23": {}}, "test": {"c23": {}}}
    path = tmp_path / "FaceForensics++.json"
    path.write_text(json.dumps(tree))
    return path, tree


def test_deepfakebench_with_compression(tmp_path):
    path, _ = ffpp(tmp_path)
    samples = read_dataset(path)
    assert len(samples) == 6 * 3
    assert {s.method for s in samples} == {"real", "FF-DF", "FF-NT"}
    assert {s.split for s in samples} == {"train"}
    # Fakes of two methods with one name stay two videos, but form one group with their originals.
    assert {s.video for s in samples if s.video.endswith("/000_003")} == {
        "FaceForensics++/FF-DF/000_003", "FaceForensics++/FF-NT/000_003",
    }  # fmt: skip
    assert {s.group for s in samples} == {"FaceForensics++/pair/000_003", "FaceForensics++/FF-real/005"}
    first = [s.path.rsplit("/", 1)[1] for s in samples if s.video.endswith("FF-real/000")]
    assert first == ["000.png", "009.png", "010.png"]
    assert all(s.path.startswith(str(tmp_path)) for s in samples)
    check_samples(samples)


def test_compression_must_be_chosen_when_there_are_two(tmp_path):
    path, tree = ffpp(tmp_path)
    train = tree["FaceForensics++"]["FF-DF"]["train"]
    train["c40"] = train["c23"]
    path.write_text(json.dumps(tree))
    with pytest.raises(DatasetError, match=r"\['c23', 'c40'\]: choose one"):
        read_deepfakebench(path)
    # Each label has one level, but not the same one: the classes would differ in their compression.
    del train["c23"]
    path.write_text(json.dumps(tree))
    with pytest.raises(DatasetError, match=r"\['c23', 'c40'\]: choose one"):
        read_deepfakebench(path)
    train["c23"] = train["c40"]
    path.write_text(json.dumps(tree))
    with pytest.raises(DatasetError, match="no compression 'raw'"):
        read_deepfakebench(path, compression="raw")
    assert read_deepfakebench(path, compression="c23")


def test_no_compression_level_backslashes_and_prefix(tmp_path):
    touch(tmp_path / "here" / "id0_0000" / "000.png")
    tree = {"Celeb-DF-v2": {"CelebDFv2_real": {"test": {"id0_0000": {
        "label": "CelebDFv2_real", "frames": ["D:\\old\\rgb\\id0_0000\\000.png"]}}}}}  # fmt: skip
    path = tmp_path / "c.json"
    path.write_text(json.dumps(tree))
    samples = read_deepfakebench(path, prefix_map={"D:\\old": "nowhere", "D:\\old\\rgb": "here"}, compression="c23")
    assert [s.path for s in samples] == [str(tmp_path / "here" / "id0_0000" / "000.png")]
    assert samples[0].video == "Celeb-DF-v2/CelebDFv2_real/id0_0000"


def test_missing_frame(tmp_path):
    path, _ = ffpp(tmp_path)
    gone = tmp_path / "ff/FF-DF/c23/000_003/009.png"
    gone.unlink()
    with pytest.raises(DatasetError, match=r"1 frames that do not exist \(of 18\).*009.png"):
        read_deepfakebench(path)
    with pytest.warns(UserWarning, match="1 frames that do not exist"):
        assert len(read_deepfakebench(path, missing="skip")) == 17


def test_label_outside_the_table(tmp_path):
    path, tree = ffpp(tmp_path)
    ff = tree["FaceForensics++"]
    ff["FF-Banana"] = json.loads(json.dumps(ff.pop("FF-NT")).replace('"label": "FF-NT"', '"label": "FF-Banana"'))
    path.write_text(json.dumps(tree))
    with pytest.raises(DatasetError, match=r"label 'FF-Banana' is not in the table.*label_map"):
        read_deepfakebench(path)
    samples = read_deepfakebench(path, label_map={"FF-Banana": 1})
    assert sum(s.method == "FF-Banana" for s in samples) == 3


@pytest.mark.parametrize("name, label", [
    ("FF-real", 0), ("CelebDFv2_real", 0), ("DFDCP_Real", 0), ("real", 0), ("e4s_Real", 0),
    
    ("fake-surreal", 1), ("fake-photo-real", 1), ("fake-e4s_Real", 1), ("photo-fake", 1),
    ("FF-F2F", 1), ("DFDCP_FakeA", 1), ("UADFV_Fake", 1), ("fake-anything", 1), ("DFD_fake", 1),
])  # fmt: skip
def test_label_table(name, label):
    assert label_of(name) == label


@pytest.mark.parametrize("name", ["surreal", "photo-real", "un-real", "hyper_real", "FF-unreal", "fake-"])
def test_a_name_that_ends_in_real_is_no_real_name(name):
    with pytest.raises(DatasetError, match="not in the table"):
        label_of(name)
    assert label_of(name, {name: 0}) == 0


def test_record_that_contradicts_its_place(tmp_path):
    path, tree = ffpp(tmp_path)
    tree["FaceForensics++"]["FF-real"]["train"]["c23"]["000"]["label"] = "FF-DF"
    path.write_text(json.dumps(tree))
    with pytest.raises(DatasetError, match="has label 'FF-DF', but is listed under 'FF-real'"):
        read_deepfakebench(path)


def test_write_and_read_again(tmp_path):
    path, _ = ffpp(tmp_path)
    samples = read_deepfakebench(path)
    samples += [
        Sample(str(touch(tmp_path / "x" / "0.png")), 1, "other", "my-gan", "other/fake-my-gan/x", "", "other/g"),
        Sample(str(touch(tmp_path / "y" / "0.png")), 0, "other", "real", "other/real/y", "val"),
    ]
    write_deepfakebench(samples, tmp_path / "again.json")
    again = read_deepfakebench(tmp_path / "again.json")

    def strip(part):
        return sorted((s.path, s.label, s.dataset, s.method, s.split, s.group.replace("FF-real", "real")) for s in part)

    assert strip(again) == strip(samples)
    assert str(tmp_path) not in (tmp_path / "again.json").read_text()
    assert not list(tmp_path.glob(".*tmp"))


@pytest.mark.parametrize("method", [
    "surreal", "e4s_Real", "real", "fake-x", "Fake-x", "x_fake", "FF-DF", "FaceShifter", "DFDCP_FakeA", "sd2.1", "a b",
])  # fmt: skip
def test_every_method_name_survives_writing(tmp_path, method):
    samples = [
        Sample(str(touch(tmp_path / "f" / "0.png")), 1, "d", method, "d/fake/v", "test", "d/g"),
        Sample(str(touch(tmp_path / "r" / "0.png")), 0, "d", "real", "d/real/v", "test", "d/g"),
    ]
    write_deepfakebench(samples, tmp_path / "d.json")
    again = read_deepfakebench(tmp_path / "d.json")
    assert [(s.path, s.label, s.method, s.split, s.group) for s in again] == [
        (s.path, s.label, s.method, s.split, s.group) for s in samples
    ]


def test_two_videos_never_become_one_when_written(tmp_path):
    samples = [sample(str(touch(tmp_path / n)), video=f"d/{n}/v") for n in ("real", "FF-real")]
    with pytest.raises(DatasetError, match=r"'d/real/v' and 'd/FF-real/v' would become one"):
        write_deepfakebench(samples, tmp_path / "d.json")


def test_files_of_this_program_are_not_lists_of_videos(tmp_path):
    write_recipe(tmp_path, CropRecipe("tile", 64))
    with pytest.raises(DatasetError, match=f"lists no images: name the folder {re.escape(str(tmp_path))} instead"):
        read_deepfakebench(tmp_path / "crops.json")
    other = tmp_path / "case.json"
    other.write_text('{"format": "masm-detect-analysis", "version": 1}')
    with pytest.raises(DatasetError, match=r"is of the format masm-detect-analysis, and lists no images$"):
        read_deepfakebench(other)
