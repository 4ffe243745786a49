"""`masm analyze`: the page and the JSON hold what a person needs, and nothing is loaded from elsewhere."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
import tiny
from command_line import assert_one_line, code_of
from masm_detect.casework.analyze import analyze
from masm_detect.casework.calibrate import calibrate
from masm_detect.casework.detector import ScoreOptions
from masm_detect.config import ConfigError
from trained_runs import face_photograph, face_recipe, tiny_run, write_rgb
from video_files import encode_video

CPU = {"device": "cpu", "progress": False}


def test_report_of_a_photograph_and_a_video(tmp_path, seed):
    run = tiny_run(tmp_path, face_recipe())
    picture = write_rgb(tmp_path / "<b>a.png", face_photograph())
    video = encode_video(tmp_path / "clip.mp4", 9)
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    content = analyze(run, [picture, video, empty], tmp_path / "out", **CPU)
    page = (tmp_path / "out" / "report.html").read_text()
    assert content == json.loads((tmp_path / "out" / "report.json").read_text())
    one, no_face, unread = content["files"]
    assert (
        one["verdict"] == "uncalibrated" and one["media"]["sha256"] == hashlib.sha256(picture.read_bytes()).hexdigest()
    )
    assert [len(m["values"]) for m in one["maps"]] == [7] and one["media"]["c2pa"]["state"] in ("none", "not read")
    assert no_face["p_fake"] is None and no_face["reason"] == "no face" and no_face["media"]["codec"] == "h264"
    assert "empty" in unread["reason"]
    assert "no verdict: the run is not calibrated" in page.lower() and "A map is no" in page
    assert "<b>a.png" not in page and "&lt;b&gt;a.png" in page
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:|#)', page)
    for digest in (*content["run"]["adapter_sha256"].values(), content["run"]["base_sha256"]):
        assert re.fullmatch("[0-9a-f]{64}", digest) and digest in page
    with pytest.raises(ConfigError, match="already holds a report"):
        analyze(run, [picture], tmp_path / "out", **CPU)


def test_verdicts_and_what_they_promise(tmp_path):
    run = tiny_run(tmp_path, method="full")
    calibrate(run, [str(tiny.write_data(tmp_path / "new", seed=1))], false_alarm_rate=0.1, miss_rate=0.1,
              precision="fp32", **CPU)  # fmt: skip
    content = analyze(run, [tmp_path / "new"], tmp_path / "out", ScoreOptions(as_is=True), maps=False, **CPU)
    verdicts = {file["verdict"] for file in content["files"]}
    page = (tmp_path / "out" / "report.html").read_text()
    assert verdicts <= {"likely fake", "likely real", "unsure"} and "uncalibrated" not in verdicts
    assert ("as far as this detector can tell" in page) == ("likely real" in verdicts)
    limit = round(100 * content["run"]["calibration"]["auc"])
    assert f"it gives the fake one the higher score in {limit} of 100 cases" in page
    ((name, forgeries),) = content["run"]["trained_on"].items()
    assert f"was trained on the forgeries {', '.join(forgeries)} of the data set {name}" in page
    assert "--as-is" in content["command"] and content["run"]["calibration"]["n_real"] == 12
    assert not any(file["maps"] for file in content["files"])


def test_pictures_unlike_the_validation_data_get_no_verdict(tmp_path, monkeypatch):
    from masm_detect.evaluation.calibration import Calibration

    run = tiny_run(tmp_path)
    calibrate(run, [str(tiny.write_data(tmp_path / "new", seed=1))], precision="fp32", **CPU)
    monkeypatch.setattr(Calibration, "verdict", lambda self, p: "likely fake")
    monkeypatch.setattr(Calibration, "distance", lambda self, features: np.full(len(features), 9.0))
    monkeypatch.setattr("masm_detect.casework.detector.load_calibration", _near_only)
    content = analyze(run, [tmp_path / "new" / "real"], tmp_path / "out", ScoreOptions(as_is=True), maps=False, **CPU)
    assert {file["verdict"] for file in content["files"]} == {"unsure"}
    assert all("unlike" in file["warnings"][0]["text"] for file in content["files"])


def _near_only(run):
    from dataclasses import replace

    from masm_detect.evaluation.calibration import load_calibration

    return replace(load_calibration(run), farthest=1.0)


def judged(verdict, rows=32, deciding=1, selected_on=False):
    """The reason that the page gives for a verdict."""
    from types import SimpleNamespace

    from masm_detect.report.analysis_page import verdict_reason

    calibration = {
        **{"thresholds": {"fake": 0.9, "real": 0.2}, "rate_limits": {"fake": 0.02, "real": 0.15}},
        **{"false_alarm_rate": 0.004, "miss_rate": 0.05, "n_real_groups": 249, "n_fake_groups": 19},
        **{"images_per_video": (8, 8.0), "selected_on": selected_on},
    }
    score = SimpleNamespace(
        p_fake=0.5, calibrated=0.95, verdict=verdict, outside=False, deciding=deciding, deciding_rows=[None] * rows
    )
    return verdict_reason(score, calibration)


def test_a_verdict_promises_no_more_than_it_can():
    one = judged("likely fake")
    assert "at most 0.4% score so on average" in one and "less than about 2%" in one and "estimates" not in one
    three = judged("likely fake", deciding=3)
    assert "at most 1.2%" in three and "less than about 6%" in three and "3 faces" in three
    assert "at most 5%" in judged("likely real", deciding=3)  # the face with the highest score decides
    for verdict in ("likely fake", "likely real", "unsure"):
        few = judged(verdict, rows=1)
        assert "at least 8 images" in few and "with 1 is unknown" in few
        assert ("at most" in few) == (verdict == "unsure")
        assert "estimates" in judged(verdict, selected_on=True)


def test_command(tmp_path, capsys):
    run = tiny_run(tmp_path)
    picture = write_rgb(tmp_path / "a.png", face_photograph()[:60, :60])
    arguments = ["analyze", str(run), str(picture), "--out", str(tmp_path / "out"), "--device", "cpu", "--no_maps"]
    assert code_of(arguments) == 0
    out = capsys.readouterr().out
    assert "no verdict: the run is not calibrated" in out
    cautions = json.loads((tmp_path / "out" / "report.json").read_text())["files"][0]["warnings"]
    assert cautions and all(f"  caution: {warning['text']}\n" in out for warning in cautions)
    assert code_of(arguments) == 2
    assert_one_line(capsys.readouterr().err, "--overwrite")
    (tmp_path / "b.png").write_bytes(b"x")
    assert code_of([*arguments[:3], str(tmp_path / "b.png"), *arguments[3:], "--overwrite"]) == 3
    assert "b.png: not scored" in capsys.readouterr().out
