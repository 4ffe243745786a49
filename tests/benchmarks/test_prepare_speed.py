"""The benchmark of `masm prepare`: what it compares and how it counts."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from masm_detect.results import read_json
from prepare_runs import BrightFaces
from video_files import write_video


@pytest.fixture
def prepare():
    return importlib.import_module("prepare")


def test_overlap(prepare):
    assert prepare.overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert prepare.overlap((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert prepare.overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0


def test_a_whole_run(prepare, tmp_path, monkeypatch, capsys):
    for name in ("real/a.avi", "fake-x/b.avi"):
        write_video(tmp_path / "videos" / name, 8, dark=(0,))
    monkeypatch.setattr(prepare, "MtcnnDetector", BrightFaces)
    monkeypatch.setattr(prepare.joblib, "Parallel", lambda n_jobs: list)  # the patch does not reach other processes
    monkeypatch.setattr(prepare.joblib, "delayed", lambda f: f)
    timed = []
    monkeypatch.setattr(prepare, "_prepare", lambda command, *_: timed.append(command[-2:]))
    out = tmp_path / "out.json"
    arguments = ["prepare.py", str(tmp_path / "videos"), "--frames", "4", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*arguments, "--baseline", "old/masm"])
    assert prepare.main() == 0
    result = read_json(out)
    faces = result["faces"]
    assert (faces["frames"], faces["whole_frame"], faces["prepare"], faces["same"]) == (8, 6, 6, 6)
    assert faces["overlap"]["p50"] == 1
    contenders = result["time"]["contenders"]
    assert {"decode", "baseline", "prepare, 1 worker(s)"} <= set(contenders)
    assert contenders["decode"]["rounds"] == 2 and timed.count(["old/masm"]) == 2
    assert "times decode" in capsys.readouterr().out and np.isfinite(contenders["baseline"]["ratio"]["median"])
