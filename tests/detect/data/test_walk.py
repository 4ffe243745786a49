"""Folders as every command walks them."""

from __future__ import annotations

import pytest
from masm_detect.data.folders import read_folder
from masm_detect.data.sample import DatasetError
from masm_detect.data.videos import find_videos
from masm_detect.data.walk import absent_files, files_below


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def names(folder):
    return [file.relative_to(folder).as_posix() for file in files_below(folder)]


def test_links_are_followed_and_hidden_names_are_not(tmp_path):
    touch(tmp_path / "store" / "deep" / "10.png")
    touch(tmp_path / "store" / "2.png")
    touch(tmp_path / "data" / "a" / "1.png")
    for hidden in (".ipynb_checkpoints/1.png", "a/.thumbnails/1.png", ".DS_Store"):
        touch(tmp_path / "data" / hidden)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "one.png").symlink_to(tmp_path / "store" / "2.png")
    assert names(tmp_path / "data") == ["a/1.png", "linked/2.png", "linked/deep/10.png", "one.png"]


def test_a_folder_that_is_linked_twice_is_read_twice_but_a_cycle_is_refused(tmp_path):
    touch(tmp_path / "data" / "a" / "1.png")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "data" / "a")
    assert names(tmp_path / "data") == ["a/1.png", "b/1.png"]
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    with pytest.raises(DatasetError, match=r"a/up is a link to .*data, which it is in"):
        files_below(tmp_path / "data")


def test_a_link_to_nothing_is_named(tmp_path):
    touch(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DatasetError, match=r"2\.png is a link to .*gone\.png, which does not exist"):
        files_below(tmp_path)


def test_links_in_a_circle_and_a_broken_link_to_a_class(tmp_path):
    touch(tmp_path / "real" / "1.png")
    (tmp_path / "fake-x").symlink_to(tmp_path / "gone")
    for read in (read_folder, find_videos):
        with pytest.raises(DatasetError, match=r"fake-x is a link to .*gone, which does not exist"):
            read(tmp_path)
    (tmp_path / "fake-x").unlink()
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real" / "loop")
    with pytest.raises(DatasetError, match="loop"):
        files_below(tmp_path / "real")


def test_training_and_prepare_see_the_same(tmp_path):
    for file in ("store/v1/0.png", "data/real/v2/0.png", "data/fake-x/v3/0.png", "data/real/.cache/v/0.png"):
        touch(tmp_path / file)
    touch(tmp_path / "data" / "real" / "notes.txt")
    (tmp_path / "data" / "real" / "v1").symlink_to(tmp_path / "store" / "v1")
    with pytest.warns(UserWarning, match=r"1 files are not images or videos and were left out: .*notes\.txt") as told:
        samples = read_folder(tmp_path / "data")
    assert len(told) == 1
    assert {s.video for s in samples} == {"data/real/v1", "data/real/v2", "data/fake-x/v3"}
    with pytest.warns(UserWarning, match="notes.txt"):
        assert [v.key for v in find_videos(tmp_path / "data")] == ["fake-x/v3", "real/v1", "real/v2"]


def test_absent_files_of_a_folder_that_is_listed_and_of_one_that_is_not(tmp_path):
    names = [f"{i}.png" for i in range(6)]
    for folder in ("many", "few"):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    (tmp_path / "many" / "6.png").mkdir()
    (tmp_path / "many" / "7.png").symlink_to(tmp_path / "few" / "0.png")
    (tmp_path / "many" / "8.png").symlink_to(tmp_path / "gone.png")
    there = [str(tmp_path / folder / name) for folder, name in (("many", "0.png"), ("many", "7.png"), ("few", "1.png"))]
    there += [str(tmp_path / "many" / ".." / "many" / name) for name in names]
    gone = [str(tmp_path / path) for path in ("many/6.png", "many/8.png", "many/9.png", "few/9.png", "none/0.png")]
    gone += [str(tmp_path / "none" / name) for name in names]
    assert absent_files(there + gone) == set(gone)


def test_absent_files_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.png").touch()
    assert absent_files([f"{i}.png" for i in range(6)]) == {f"{i}.png" for i in range(1, 6)}
