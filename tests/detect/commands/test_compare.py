"""`masm eval --scores` and `masm compare`, as a user calls them."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from command_line import assert_one_line, code_of
from score_files import read_csv, write_csv, write_runs

QUIET = ["--runtime.progress", "false"]


def test_score_files_are_evaluated_and_compared(tmp_path, seed, capsys):
    files = write_runs(tmp_path / "in", seed, {"good": 4.0, "poor": 0.3})
    out = tmp_path / "eval"
    assert code_of(["eval", "--scores", *files, "--out", str(out), *QUIET]) == 0
    printed = capsys.readouterr().out
    assert "good" in printed and "report.html" in printed
    results = json.loads((out / "results.json").read_text())
    assert set(results["runs"]) == {"good", "poor"} and results["config"]["scores"] == ["good.csv", "poor.csv"]
    assert files[0] not in (out / "results.json").read_text()
    kept = read_csv(out / "good" / "scores.csv")
    assert [row["p_fake"] for row in kept] == [str(float(row["score"])) for row in read_csv(files[0])]
    videos = read_csv(out / "good" / "videos.csv")
    assert len(videos) == 60 and {row["frames"] for row in videos} == {"2"}
    assert float(videos[0]["p_fake"]) == pytest.approx(np.mean([float(row["p_fake"]) for row in kept[:2]]))
    numbers = results["runs"]["good"]["datasets"]["one"]["all"]
    assert numbers["n_real_videos"] == 30 and numbers["video_brier"] is not None

    assert code_of(["eval", "--scores", *files, "--out", str(out), *QUIET]) == 2
    assert_one_line(capsys.readouterr().err, "already holds results")
    assert code_of(["eval", "--scores", *files, "--out", str(out), "--overwrite", *QUIET]) == 0

    capsys.readouterr()
    assert code_of(["compare", str(out), "--out", str(tmp_path / "cmp")]) == 0
    assert "good is better" in capsys.readouterr().out
    content = json.loads((tmp_path / "cmp" / "compare.json").read_text())
    assert content["provenance"]["packages"]["torch"] and len(content["comparisons"]) == 2
    page = (tmp_path / "cmp" / "compare.html").read_text()
    assert "good is better" in page and "<script" not in page and 'src="http' not in page
    assert cv2.imread(str(tmp_path / "cmp" / "compare.png")) is not None
    assert code_of(["compare", str(out), "--out", str(tmp_path / "cmp")]) == 2
    assert_one_line(capsys.readouterr().err, "already holds a comparison")
    # a folder of a run, and a file that is the same scores: equal
    again = ["compare", str(out / "good"), files[0], "--out", str(tmp_path / "same")]
    assert code_of(again) == 0 and "cannot be told apart" in capsys.readouterr().out


def test_groups_are_added_up(tmp_path, seed, capsys):
    files = write_runs(tmp_path, seed, dict.fromkeys("abcd", 1.0))
    groups = ["--group", f"x={files[0]},{files[1]}", f"--group=y={files[2]},{files[3]}"]
    assert code_of(["compare", *groups, "--out", str(tmp_path / "out"), "--variance", "delong"]) == 0
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {name: len(one["runs"]) for name, one in content["detectors"].items()} == {"x": 2, "y": 2}
    (tmp_path / "c.yaml").write_text(json.dumps({"group": [groups[1]], "out": str(tmp_path / "out2")}))
    assert code_of(["compare", "--config", str(tmp_path / "c.yaml"), files[2]]) == 0
    content = json.loads((tmp_path / "out2" / "compare.json").read_text())
    assert list(content["detectors"]) == ["c", "x"]


def test_mistakes_are_one_line(tmp_path, seed, capsys):
    files = write_runs(tmp_path, seed, {"a": 1.0})
    for arguments, message in (
        (["compare", files[0]], "needs two detectors"),
        (["compare", files[0], str(tmp_path / "none.csv")], "cannot read the score file"),
        (["eval", "--scores", str(tmp_path / "none.csv"), "--out", str(tmp_path / "o")], "cannot read the score file"),
        (["eval", "--out", str(tmp_path / "o")], "or score files with --scores"),
    ):
        assert code_of(arguments) == 2
        assert_one_line(capsys.readouterr().err, message)


def test_the_report_shows_errors_and_names_what_it_cannot_read(tmp_path, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for label in (0, 1):
        for number in range(6):
            path = tmp_path / "images" / f"{label}-{number}.png"
            path.parent.mkdir(exist_ok=True)
            if number:  # the first is absent
                assert cv2.imwrite(str(path), rng.integers(0, 255, (400, 300, 3), dtype=np.uint8))
            rows.append((path, label, 0.9 - 0.001 * number if number < 3 else 0.1))
    write_csv(tmp_path / "s.csv", ("file", "label", "p_fake"), rows)
    assert code_of(["eval", "--scores", str(tmp_path / "s.csv"), "--out", str(tmp_path / "out"), *QUIET]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    # false alarms: reals 0, 1, 2; misses: fakes 3, 4, 5
    assert "3 of 6 images are wrong at 0.5" in page and page.count("data:image/jpeg") == 2 + 3
    assert "cannot be read as images here" in page and "images/0-0.png" in page
    assert page.index("0-1.png") < page.index("0-2.png")  # the worst comes first
    assert "1-0.png" not in page and "n = 12" in page and "<script" not in page
