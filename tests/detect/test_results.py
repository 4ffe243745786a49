"""Result files: whole or absent, checked when read."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from masm_detect.results import ResultError, check_output_folder, prepare_outputs, read_json, write_json, write_text


def test_json_has_no_nan_and_takes_numpy(tmp_path):
    write_json(tmp_path / "a" / "r.json", {"x": math.nan, "y": [np.float32(0.5), np.int64(3)], 4: (math.inf, True)})
    assert read_json(tmp_path / "a" / "r.json") == {"x": None, "y": [0.5, 3], "4": [None, True]}


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    with pytest.raises(AttributeError):
        write_text(path, None)
    assert read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_a_byte_of_a_name_that_is_not_utf_8_is_escaped(tmp_path):
    write_text(tmp_path / "a.txt", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "a.txt").read_bytes() == rb"caf\udce9"


def test_broken_json_is_named(tmp_path):
    (tmp_path / "r.json").write_text('{"a": ')
    with pytest.raises(ResultError, match=r"r\.json is not valid JSON"):
        read_json(tmp_path / "r.json")
    with pytest.raises(ResultError, match="cannot read"):
        read_json(tmp_path / "none.json")


def test_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    check_output_folder(tmp_path / "new" / "folder")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResultError, match="file is a file"):
            check_output_folder(path)


def test_files_that_exist_or_are_read_are_not_replaced(tmp_path):
    old, mark = tmp_path / "scores.csv", tmp_path / "results.json"
    prepare_outputs([old, mark])
    old.write_text("mine")
    mark.write_text("{}")
    with pytest.raises(ResultError, match=r"scores\.csv exists already.*--overwrite"):
        prepare_outputs([old, mark])
    with pytest.raises(ResultError, match="read by this command"):
        prepare_outputs([old, mark], [tmp_path / "x" / ".." / "scores.csv"], overwrite=True)
    assert mark.exists()
    prepare_outputs([old, mark], overwrite=True)
    assert old.read_text() == "mine" and not mark.exists()  # an interrupted command leaves no mark
