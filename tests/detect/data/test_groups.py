"""A fake and its originals are one group."""

from __future__ import annotations

from masm_detect.data.folders import read_folder


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_a_picture_and_its_forgeries_are_one_group(tmp_path):
    for name in ("real/a.png", "fake-x/a.jpg", "fake-y/a/0.png", "real/b.png", "fake-x/c.png"):
        touch(tmp_path / "set" / name)
    groups = {s.video: s.group for s in read_folder(tmp_path / "set")}
    assert groups == {
        "set/real/a": "set/name/a",
        "set/fake-x/a": "set/name/a",
        "set/fake-y/a": "set/name/a",
        "set/real/b": "set/real/b",
        "set/fake-x/c": "set/fake-x/c",
    }


def test_equal_names_of_pairs_keep_the_pair(tmp_path):
    for name in ("real/000/0.png", "real/003/0.png", "fake-DF/000_003/0.png", "fake-NT/000_003/0.png"):
        touch(tmp_path / "ff" / name)
    assert {s.group for s in read_folder(tmp_path / "ff")} == {"ff/pair/000_003"}
