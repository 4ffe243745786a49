"""`masm robustness` on ready crops: the scores of `masm eval` without distortion, each cell on its own, resumable."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
from command_line import assert_one_line, code_of
from masm_detect.config import ConfigError, EvalConfig, RuntimeConfig
from masm_detect.data.sample import DatasetError
from masm_detect.data.sources import load_samples
from masm_detect.evaluation.calibration import Calibration, save_calibration
from masm_detect.evaluation.compare import compare_scores
from masm_detect.evaluation.evaluate import evaluate
from masm_detect.robustness import crops, parts
from masm_detect.robustness.robustness import RobustnessConfig, robustness
from sklearn.metrics import roc_auc_score
from trained_runs import tiny_run
from video_files import striped

RUNTIME = RuntimeConfig(device="cpu", progress=False, eval_batch_size=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("run")
        patch.setattr("masm_detect.data.content_cache.default_cache_file", lambda: folder / "contents.sqlite")
        return tiny_run(folder, recipe=None)


@pytest.fixture
def data(tmp_path, seed):
    return tiny.write_data(tmp_path / "set", seed)


def examine(run, data, out, cells, *, overwrite=False, seed=0, **options):
    config = EvalConfig(runs=[str(run)], paths=[str(data)], out=str(out), runtime=RUNTIME, overwrite=overwrite)
    return robustness(config, RobustnessConfig(cells=cells, seed=seed, **options))


def lines(out):
    """Name of a cell -> the lines of scores.csv, without distortion and level."""
    found = {}
    with open(out / "scores.csv") as file:
        for row in csv.DictReader(file):
            name = row.pop("distortion"), row.pop("level")
            found.setdefault(":".join(part for part in name if part), []).append(row)
    return found


def test_clean_scores_are_those_of_eval_to_the_last_bit(run, data, tmp_path):
    examine(run, data, tmp_path / "out", "jpeg:50")
    evaluate(EvalConfig(runs=[str(run)], paths=[str(data)], out=str(tmp_path / "eval"), runtime=RUNTIME))
    with open(tmp_path / "eval" / "run" / "scores.csv") as file:
        assert lines(tmp_path / "out")["clean"] == list(csv.DictReader(file))


def test_a_cell_depends_on_no_other_cell_and_not_on_the_folder(run, data, tmp_path):
    examine(run, data, tmp_path / "a", "noise:1,noise:2,jpeg:50,blocks:3")
    alone = examine(run, data, tmp_path / "b", "noise:2")
    assert lines(tmp_path / "b")["noise:2"] == lines(tmp_path / "a")["noise:2"]
    assert alone["datasets"]["set"]["cells"][1]["level"] == "2"
    shutil.copytree(data, tmp_path / "moved" / "set")
    examine(run, tmp_path / "moved" / "set", tmp_path / "c", "noise:2")
    logits = [[row["logit"] for row in lines(tmp_path / name)["noise:2"]] for name in "bc"]
    assert logits[0] == logits[1]
    examine(run, data, tmp_path / "d", "noise:2", seed=1)
    assert lines(tmp_path / "d")["noise:2"] != lines(tmp_path / "b")["noise:2"]
    assert lines(tmp_path / "d")["clean"] == lines(tmp_path / "b")["clean"]


def test_the_numbers_are_those_of_the_scores(run, data, tmp_path):
    content = examine(run, data, tmp_path / "out", "noise:5,contrast:5,thumbnail:256")
    assert content == json.loads((tmp_path / "out" / "robustness.json").read_text())
    entry, rows = content["datasets"]["set"], lines(tmp_path / "out")
    labels = [int(row["label"]) for row in rows["clean"]]
    scores = {name: [float(row["p_fake"]) for row in found] for name, found in rows.items()}
    samples = load_samples([str(data)])
    for cell in entry["cells"]:
        name = cell["cell"]
        assert cell["auc"] == pytest.approx(roc_auc_score(labels, scores[name]))
        if name != "clean":
            pair = compare_scores(samples, scores[name], scores["clean"])
            assert cell["difference"]["difference"] == pytest.approx(pair["difference"])
            assert cell["difference"]["ci"] == pair["difference_ci"]
            flips = np.mean([(a >= 0.5) != (b >= 0.5) for a, b in zip(scores[name], scores["clean"])])
            assert cell["flips"]["share"] == pytest.approx(flips)
    # a thumbnail of 256 px changes nothing in images of 28 px: no evidence of robustness, so not in the means
    same = entry["cells"][-1]
    assert same["cell"] == "thumbnail:256" and same["unchanged"] == same["scored"] == 24 and not same["counts"]
    kept = [cell["auc"] for cell in entry["cells"][1:-1]]
    assert entry["overall"]["all"]["auc"] == pytest.approx(np.mean(kept)) and entry["overall"]["all"]["cells"] == 2
    assert entry["overall"]["worst"]["auc"] == min(kept)
    assert entry["overall"]["deeperforensics"]["of"] == 35


def test_intervals_with_enough_groups(run, tmp_path, seed):
    """24 images of each class: intervals of AUC, of the differences, and of their mean."""
    for part in (0, 1):
        tiny.write_data(tmp_path / f"{part}", seed + part)
        for file in (tmp_path / f"{part}").rglob("*.png"):
            target = tmp_path / "set" / file.parent.name / f"{part}-{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
    entry = examine(run, tmp_path / "set", tmp_path / "out", "noise:4,noise:5,blur:5")["datasets"]["set"]
    rows = lines(tmp_path / "out")
    mean = entry["overall"]["all"]["difference"]
    assert mean["difference"] == pytest.approx(np.mean([c["difference"]["difference"] for c in entry["cells"][1:]]))
    assert mean["ci"] is not None and mean["ci"][0] <= mean["difference"] <= mean["ci"][1]
    samples = load_samples([str(tmp_path / "set")])
    for cell in entry["cells"][1:]:
        scores = [[float(row["p_fake"]) for row in rows[name]] for name in (cell["cell"], "clean")]
        assert cell["difference"]["ci"] == pytest.approx(compare_scores(samples, *scores)["difference_ci"])


def test_every_file_is_decoded_once(run, data, tmp_path, monkeypatch):
    decoded, real = [], crops.read_image
    monkeypatch.setattr(crops, "read_image", lambda path: decoded.append(path) or real(path))
    monkeypatch.setattr(crops, "_BATCHES", 1)  # parts of five images
    frames_of_videos(data)
    examine(run, data, tmp_path / "out", "noise,jpeg:50,social,h264:35,hevc:28")
    assert sorted(decoded) == sorted(map(str, data.rglob("*.png")))


def frames_of_videos(data, sizes=(28, 28, 28, 28, 28, 28, 28)):
    """Two videos of seven frames, real and fake, beside the images of the data set."""
    import cv2

    for number, kind in enumerate(("real", "fake-stripes")):
        (data / kind / "clip").mkdir()
        for frame, size in enumerate(sizes):
            cv2.imwrite(str(data / kind / "clip" / f"{frame}.png"), striped((size, size), frame + 50 * number))


def test_codecs_encode_the_frames_of_a_video_in_order(run, data, tmp_path, monkeypatch):
    clips, real = [], crops.Cell.clip
    monkeypatch.setattr(crops, "_BATCHES", 1)
    monkeypatch.setattr(crops.Cell, "clip", lambda cell, frames: clips.append(list(frames)) or real(cell, frames))
    frames_of_videos(data)
    content = examine(run, data, tmp_path / "out", "h264:35")
    cell = content["datasets"]["set"]["cells"][1]
    assert (cell["wanted"], cell["scored"]) == (14, 14)
    assert cell["skipped"] == {"its video has one frame only": 24}
    assert cell["difference"]["n"] == 14
    # each video is encoded once, though it lies in several parts
    assert len(clips) == 2 and all(len(clip) == 7 for clip in clips)
    for number, clip in zip((1, 0), clips):  # fake-stripes comes first
        assert all(np.array_equal(rgb[..., ::-1], striped((28, 28), i + 50 * number)) for i, rgb in enumerate(clip))


def test_frames_of_several_sizes_are_lost_with_a_reason(run, data, tmp_path):
    frames_of_videos(data, sizes=(28, 30, 28))
    cell = examine(run, data, tmp_path / "out", "hevc:28")["datasets"]["set"]["cells"][1]
    assert (cell["wanted"], cell["scored"], cell["coverage"]) == (6, 0, 0.0)
    assert cell["lost"] == {"the frames of its video differ in size": 6} and cell["auc"] is None


def test_a_killed_command_goes_on(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "_BATCHES", 1)
    cells = "noise:5,blur:3,h264:35"
    frames_of_videos(data)
    examine(run, data, tmp_path / "whole", cells)
    real, left, scored = parts.PartJournal.add_scores, [13], []

    def dying(journal, scores):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        scored.append((scores.part, scores.cell))
        real(journal, scores)

    monkeypatch.setattr(parts.PartJournal, "add_scores", dying)
    with pytest.raises(KeyboardInterrupt):
        examine(run, data, tmp_path / "out", cells)
    journal = tmp_path / "out" / parts.JOURNAL
    assert not (tmp_path / "out" / "robustness.json").exists()
    journal.write_text(journal.read_text() + '{"part": 3, "ce')  # killed while it wrote
    with pytest.raises(ConfigError, match=r"other settings \(seed\)"):
        examine(run, data, tmp_path / "out", cells, seed=1)
    left[0] = 10**6
    examine(run, data, tmp_path / "out", cells)
    assert len(scored) == len(set(scored)) == 4 * 8  # nothing was scored twice
    assert (tmp_path / "out" / "scores.csv").read_text() == (tmp_path / "whole" / "scores.csv").read_text()
    assert not journal.exists()
    with pytest.raises(ConfigError, match="already holds results"):
        examine(run, data, tmp_path / "out", cells)
    examine(run, data, tmp_path / "out", "blur:3", overwrite=True)


def test_threads_change_nothing(run, data, tmp_path):
    examine(run, data, tmp_path / "one", "noise:5,social")
    config = EvalConfig(runs=[str(run)], paths=[str(data)], out=str(tmp_path / "two"),
                        runtime=RuntimeConfig(device="cpu", progress=False, eval_batch_size=5, workers=3))  # fmt: skip
    robustness(config, RobustnessConfig(cells="noise:5,social"))
    assert (tmp_path / "one" / "scores.csv").read_text() == (tmp_path / "two" / "scores.csv").read_text()


def test_the_command_prints_a_table_and_writes_pages(run, data, tmp_path, capsys):
    out = tmp_path / "out"
    settings = ["--runtime.device", "cpu", "--runtime.progress", "false"]
    assert code_of(["robustness", str(run), "--data", str(data), "--out", str(out), "--quick", *settings]) == 0
    printed = capsys.readouterr().out
    assert "JPEG" in printed and "quality 50" in printed and "its video has one frame only" in printed
    files = {"robustness.json", "robustness.html", "scores.csv", "grid.png", "curves.png"}
    assert {path.name for path in out.iterdir()} == files
    page = (out / "robustness.html").read_text()
    assert "grey blocks" in page and 'src="http' not in page and 'href="http' not in page
    content = json.loads((out / "robustness.json").read_text())
    assert content["options"]["seed"] == 0 and content["provenance"]["packages"]["torch"]
    assert str(tmp_path) not in json.dumps(content["provenance"]) + json.dumps(content["run"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "jpg"], "--cells names 'jpg'"),
        (["--cells", "jpeg:55"], "jpeg has no level '55'; it has 90, 70, 50, 30, 10"),
        (["--seed", "-1"], "seed is -1; it must be 0 or more"),
        (["--raw"], "does not record how its training images were cut"),
        (["--split", "val"], "no sample has the split"),
        (["--data"], "no data given"),
    ],
)
def test_mistakes_are_one_line(run, data, tmp_path, capsys, arguments, message):
    given = [] if "--data" in arguments else ["--data", str(data)]
    arguments = [a for a in arguments if a != "--data"]
    assert code_of(["robustness", str(run), *given, "--out", str(tmp_path / "out"), *arguments]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "out" / "robustness.json").exists()


def test_one_class_is_refused(run, data, tmp_path):
    shutil.rmtree(data / "real")
    with pytest.raises(DatasetError):
        examine(run, data, tmp_path / "out", "blur")


def test_two_data_sets_have_their_own_figures(run, data, tmp_path):
    second = Path(shutil.copytree(data, tmp_path / "second"))
    config = EvalConfig(runs=[str(run)], paths=[str(data), str(second)], out=str(tmp_path / "out"), runtime=RUNTIME)
    content = robustness(config, RobustnessConfig(cells="blur:1"))
    assert [entry["cells"][1]["scored"] for entry in content["datasets"].values()] == [24, 24]
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {
        *("grid-second.png", "grid-set.png", "curves-second.png", "curves-set.png")
    }


def test_a_calibrated_run_is_judged_by_its_thresholds(run, data, tmp_path):
    calibrated = Path(shutil.copytree(run, tmp_path / "calibrated"))
    clean = examine(run, data, tmp_path / "a", "contrast:5")["datasets"]["set"]
    assert all(cell["video_accuracy_calibrated"] is None for cell in clean["cells"])
    scores = {name: [float(row["p_fake"]) for row in rows] for name, rows in lines(tmp_path / "a").items()}
    limits = np.quantile([*scores["clean"], *scores["contrast:5"]], [0.4, 0.6]).tolist()
    calibration = Calibration(
        scale=1.0, offset=0.0, thresholds={"real": limits[0], "fake": limits[1]}, false_alarm_rate=0.05, miss_rate=0.05,
        n_real=9, n_fake=9, n_real_groups=9, n_fake_groups=9, share_of_fakes=0.5, ece_before=0.0, ece_after=0.0,
        auc=0.5,
    )  # fmt: skip
    save_calibration(calibrated, calibration, {})
    content = examine(calibrated, data, tmp_path / "b", "contrast:5")
    cell = content["datasets"]["set"]["cells"][1]

    def verdict(p):
        return "likely fake" if p >= limits[1] else "likely real" if p <= limits[0] else "unsure"

    pairs = [(verdict(a), verdict(b)) for a, b in zip(scores["clean"], scores["contrast:5"])]
    flips = [f"{a} -> {b}" for a, b in pairs if a != b]
    assert cell["flips"] == {
        "videos": 24, "flipped": len(flips), "share": len(flips) / 24, "kinds": dict(Counter(flips).most_common()),
    }  # fmt: skip
    labels = [int(row["label"]) for row in lines(tmp_path / "b")["clean"]]
    right = np.mean([(b == "likely fake") == label for (_, b), label in zip(pairs, labels)])
    assert cell["video_accuracy_calibrated"] == pytest.approx(right)
    assert content["run"]["calibrated"] and "cal. acc" in (tmp_path / "b" / "robustness.html").read_text()
