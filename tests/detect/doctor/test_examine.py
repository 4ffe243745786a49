"""`examine` finds each kind of problem, all of them at once, and none in clean data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from masm_detect.data.sample import DatasetError
from masm_detect.doctor.examine import examine
from masm_detect.errors import ConfigError
from pictures import write_picture


def write_set(folder: Path, splits: tuple[str, ...] = ("",), count: int = 6, seed: int = 0) -> Path:
    """`count` reals and fakes in each split, all different."""
    for split in splits:
        for kind in ("real", "fake-x"):
            for i in range(count):
                seed += 1
                write_picture(folder / split / kind / f"{split}{kind}{i}.jpg", seed)
    return folder


def found(*paths: Path, **options) -> dict[str, list[dict]]:
    """The problems by kind, without those about shortcuts, which random pictures may have."""
    report = examine([str(path) for path in paths], limit=5, progress=False, **options)
    problems: dict[str, list[dict]] = {}
    for problem in report["problems"]:
        if problem["kind"] != "shortcut":
            problems.setdefault(problem["kind"], []).append(problem)
    levels = [problem["level"] for problem in report["problems"]]
    assert levels == sorted(levels) and report["errors"] == levels.count("error")
    return problems


def write_json(path: Path, tree: dict) -> Path:
    path.write_text(json.dumps({"set": tree}))
    return path


@pytest.mark.parametrize("splits", [("",), ("train", "val", "test")])
def test_clean_data_has_no_problem(tmp_path, splits):
    assert found(write_set(tmp_path / "set", splits)) == {}


def test_copies_between_splits_labels_and_in_one_split(tmp_path):
    data = write_set(tmp_path / "set", ("train", "test"))
    shutil.copy(data / "train/real/trainreal0.jpg", data / "test/real/renamed.jpg")
    shutil.copy(data / "train/real/trainreal1.jpg", data / "train/fake-x/renamed.jpg")
    for name in ("one", "two"):
        shutil.copy(data / "train/real/trainreal2.jpg", data / f"train/real/{name}.jpg")
    problems = found(data)
    assert {kind: [(p["level"], p["count"]) for p in part] for kind, part in problems.items()} == {
        "leak": [("error", 1), ("error", 1)],
        "label": [("error", 1)],
        "copies": [("warning", 2)],
    }
    by_name, by_bytes = (problem["lines"] for problem in problems["leak"])
    assert "renamed in test, train" in by_name[0]  # the two files called renamed are one group
    assert "test/real/renamed.jpg" in by_bytes[0] and "train/real/trainreal0.jpg" in by_bytes[0]
    assert "fake-x/renamed.jpg" in problems["label"][0]["lines"][0]


def test_copies_in_undivided_data_may_be_separated(tmp_path):
    data = write_set(tmp_path / "set")
    shutil.copy(data / "real/real0.jpg", data / "real/renamed.jpg")
    [problem] = found(data)["leak"]
    assert problem["count"] == 1 and "1 file is in two groups of data without splits" in problem["message"]
    for name in ("real0", "renamed"):
        (data / "real" / f"{name}.jpg").unlink()
    for name in ("a", "b"):
        write_picture(data / "real" / "video" / f"{name}.jpg", 1)
    assert list(found(data)) == ["copies"]  # two frames of one video: always together


def test_pictures_that_look_alike(tmp_path):
    data = write_set(tmp_path / "set", ("train", "test"), seed=100)
    write_picture(data / "test/real/renamed.jpg", 101, side=140, quality=40)
    [problem] = found(data)["look-alike"]
    assert problem["level"] == "warning" and problem["count"] == 1 and "of the test split" in problem["message"]
    other = write_set(tmp_path / "other", seed=500)
    write_picture(other / "real/as in the first set.jpg", 102, quality=60)
    write_picture(other / "fake-x/made of real0.jpg", 501, quality=60)
    messages = [problem["message"] for problem in found(data, other)["look-alike"]]
    assert len(messages) == 3 and "of other, compared with set," in messages[1]
    assert messages[2].startswith("2 pictures of other, which has no splits,")
    assert "2 of these are real and fake" in messages[2]


def test_a_group_in_two_splits(tmp_path):
    data = write_set(tmp_path / "set", ("train", "test"))
    write_picture(data / "test/fake-x/trainreal0.jpg", 77)
    [problem] = found(data)["leak"]
    assert problem["count"] == 1 and "trainreal0 in test, train" in problem["lines"][0]


def test_damaged_files_are_all_listed(tmp_path):
    data = write_set(tmp_path / "set", count=8)
    (data / "real/real0.jpg").write_bytes(b"")
    (data / "real/real1.jpg").write_bytes((data / "real/real1.jpg").read_bytes()[:-30])
    (data / "fake-x/fake-x0.jpg").write_text("no image")
    frames = {
        kind: [f"set/{kind}/{kind}{i}.jpg" for i in range(9)] for kind in ("real", "fake-x")
    }  # the last is absent
    tree = {kind: {"all": {f"{kind}{i}": {"label": kind, "frames": [f]} for i, f in enumerate(names)}}
            for kind, names in frames.items()}  # fmt: skip
    problems = found(write_json(tmp_path / "set.json", tree))
    [problem] = problems.pop("damaged")
    text = "\n".join(problem["lines"])
    assert problems == {} and problem["level"] == "error" and problem["count"] == len(problem["lines"]) == 5
    assert "real0.jpg is empty" in text and "real1.jpg is truncated" in text and "fake-x0.jpg is not an image" in text
    assert "real8.jpg cannot be read" in text and "fake-x8.jpg cannot be read" in text


def test_one_file_under_two_labels_or_splits_of_json_files(tmp_path):
    write_set(tmp_path / "set")
    real = [f"set/real/real{i}.jpg" for i in range(6)]
    fake = [f"set/fake-x/fake-x{i}.jpg" for i in range(6)]

    def videos(label: str, frames: list[str], prefix: str = "") -> dict:
        return {prefix + Path(f).stem: {"label": label, "frames": [f]} for f in frames}

    one = write_json(
        tmp_path / "one.json",
        {
            "real": {"train": videos("real", real[:4]), "test": videos("real", real[3:], "test-")},
            "fake-x": {"train": videos("fake-x", fake)},
        },
    )
    two = write_json(tmp_path / "two.json", {"fake-x": {"train": videos("fake-x", real[:2])}})
    problems = found(one, two)
    assert [p["message"] for p in problems["label"]] == ["2 files are listed under two labels"]
    assert [p["message"] for p in problems["leak"]] == ["1 file is listed in two splits"]
    assert "real0.jpg is real in" in problems["label"][0]["lines"][0]
    for splits in (["train"], "train"):
        assert found(one, two, splits=splits).keys() == {"label"}


def test_a_file_of_a_json_file_and_of_a_folder(tmp_path):
    data = write_set(tmp_path / "set", count=2)
    labels = {"real": ["set/real/real0.jpg"], "fake-x": ["set/fake-x/fake-x0.jpg", "set/real/real1.jpg"]}
    tree = {label: {"all": {f: {"label": label, "frames": [f]} for f in frames}} for label, frames in labels.items()}
    listed = write_json(tmp_path / "set.json", tree)
    [problem] = found(listed, data)["label"]
    assert problem["count"] == 1 and "real1.jpg" in problem["lines"][0]
    rows = examine([str(listed), str(data)], progress=False)["inventory"]
    assert sum(row["images"] for row in rows) == 4  # each file once


def test_a_data_set_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    data = write_set(tmp_path / "set")
    shutil.copy(data / "real/real0.jpg", data / "fake-x/renamed.jpg")
    (tmp_path / "videos" / "real").mkdir(parents=True)
    (tmp_path / "videos" / "real" / "a.mp4").touch()
    (data / "real" / "notes.txt").touch()
    problems = found(tmp_path / "videos", data)
    assert "is a video" in problems["layout"][0]["message"] and problems["label"][0]["count"] == 1
    assert any("notes.txt" in note for note in examine([str(data)], progress=False)["notes"])
    with pytest.raises(DatasetError, match="is a video"):
        examine([str(tmp_path / "videos")], progress=False)


def test_two_folders_of_one_name(tmp_path):
    one, other = write_set(tmp_path / "a" / "set"), write_set(tmp_path / "b" / "set", seed=300)
    report = examine([str(one), str(other)], progress=False)
    assert {row["dataset"] for row in report["inventory"]} == {"set", "set-2"}
    assert "two data sets have the same name" in report["notes"][0]


def test_what_is_there(tmp_path):
    data = write_set(tmp_path / "set", ("train", "test"), count=3)
    write_picture(data / "train/real/video/0.png", 50, side=64)
    write_picture(data / "train/real/video/1.jpg", 51, side=64, quality=70)
    rows = {(row["split"], row["method"]): row for row in examine([str(data)], progress=False)["inventory"]}
    assert len(rows) == 4 and rows["test", "x"]["images"] == 3
    row = rows["train", "real"]
    assert (row["images"], row["videos"], row["groups"]) == (5, 4, 4)
    assert row["pixels"] == {"96 x 96": 3, "64 x 64": 2} and row["formats"] == {"JPEG": 4, "PNG": 1}
    assert row["quality"] == [70, 95, 95]


def test_mistakes_of_the_user(tmp_path):
    data = str(write_set(tmp_path / "set"))
    for paths, options, message in (
        ([], {}, "no data given"),
        ([data, data], {}, "given twice"),
        ([data], {"limit": 0}, "limit is 0"),
        ([data], {"splits": ["test"]}, "no sample has one of the splits"),
        ([data, f"{data}/none"], {}, "there is no such file or folder"),
    ):
        with pytest.raises((ConfigError, DatasetError), match=message):
            examine(paths, progress=False, **options)
