"""`masm calibrate`: on the run's validation data or other data, never on what was trained on."""

from __future__ import annotations

import json

import masm_detect
import pytest
import tiny
from command_line import assert_one_line, code_of
from masm_detect.casework.calibrate import calibrate
from masm_detect.evaluation.calibration import CalibrationError, load_calibration
from trained_runs import tiny_run

CPU = {"device": "cpu", "progress": False, "precision": "fp32"}


@pytest.fixture
def run(tmp_path):
    return tiny_run(tmp_path, method="full")


def test_new_data_gives_verdicts(run, tmp_path):
    data = tiny.write_data(tmp_path / "new", seed=1)
    learned = calibrate(run, [str(data)], false_alarm_rate=0.1, miss_rate=0.1, **CPU)
    assert (learned.n_real, learned.n_fake_groups, learned.data) == (12, 12, ("new",))
    assert learned.features.shape == (24, 16)
    kept = load_calibration(run)
    assert kept.thresholds == learned.thresholds and None not in kept.thresholds.values()
    assert (run / "plots" / "reliability.png").is_file()
    assert json.loads((run / "calibration.json").read_text())["provenance"]["images"] == 24
    results = masm_detect.load_detector(run, "cpu").predict(tmp_path / "new", as_is=True)
    assert {r.verdict for r in results} <= {"likely fake", "likely real", "unsure"}
    assert [r.calibrated for r in results] == pytest.approx([kept.probability(r.p_fake) for r in results])


def test_training_data_is_refused(run, tmp_path):
    with pytest.raises(CalibrationError, match="was trained on"):
        calibrate(run, [str(tmp_path / "data")], **CPU)


def test_command_uses_the_validation_split(run, capsys):
    assert code_of(["calibrate", str(run), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "likely fake: never, because" in printed and "calibration.json" in printed
    assert code_of(["calibrate", str(run), "--false_alarm_rate", "2"]) == 2
    assert_one_line(capsys.readouterr().err, "false_alarm_rate is 2.0")
