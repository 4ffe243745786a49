"""`masm predict` and `masm_detect.load_detector`: the same scores as `masm eval`, and files that others read."""

from __future__ import annotations

import csv
import json

import masm_detect
import numpy as np
import pytest
import torch
from command_line import assert_one_line, code_of
from masm_detect.casework import predict as predict_module
from masm_detect.casework.detector import PredictError, ScoreOptions, deciding_track
from masm_detect.casework.predict import predict
from masm_detect.config import ConfigError
from masm_detect.data.frames import frame_dataset
from masm_detect.data.sources import load_samples
from masm_detect.evaluation.predict import predict as predict_samples
from masm_detect.evaluation.runs import load_run
from masm_detect.evaluation.score_file import ScoreRow, read_scores
from trained_runs import face_photograph, face_recipe, tiny_run, write_rgb
from video_files import encode_video, write_image


@pytest.fixture
def run(tmp_path):
    return tiny_run(tmp_path)


def noise(seed, height=60, width=90):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_ready_crops_score_as_in_eval(run, tmp_path):
    config, detector = load_run(run)
    samples = load_samples(config.data.paths)
    expected = predict_samples(detector, frame_dataset(samples, detector.backbone, config.data)).numpy()
    results = masm_detect.load_detector(run, "cpu").predict([s.path for s in samples], as_is=True, precision="fp32")
    logits = np.array([row.logit for result in results for row in result.rows])
    assert np.abs(logits - expected).max() < 1e-5
    assert [result.p_fake for result in results] == pytest.approx(torch.sigmoid(torch.tensor(logits)).tolist())


def test_files_of_every_kind(run, tmp_path, seed):
    write_rgb(tmp_path / "in" / "large.png", noise(seed))
    encode_video(tmp_path / "in" / "clip.mp4", 9)
    write_rgb(tmp_path / "in" / "small.png", noise(seed, 20, 20))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"x")
    (tmp_path / "in" / "notes.txt").write_text("left out: a folder holds other files, too")
    with pytest.warns(UserWarning, match=r"1 files are not images or videos.*notes\.txt"):
        done = predict(run, [tmp_path / "in"], tmp_path / "out", ScoreOptions(frames_per_video=3), progress=False)
    assert [f.file.split("/")[-1] for f in done.files] == ["broken.jpg", "clip.mp4", "large.png", "small.png"]
    assert [f.file.split("/")[-1] for f in done.skipped] == ["broken.jpg", "small.png"]
    rows = read_scores(tmp_path / "out" / "scores.csv")
    assert {r.frame for r in rows if r.file.endswith(".mp4")} == {0, 4, 8}
    with open(tmp_path / "out" / "videos.csv") as file:
        lines = {line["file"].split("/")[-1]: line for line in csv.DictReader(file)}
    assert float(lines["large.png"]["p_fake"]) == pytest.approx(
        np.mean([r.p_fake for r in rows if r.file.endswith("large.png")])
    )
    assert lines["small.png"]["p_fake"] == "" and "smaller than a tile" in lines["small.png"]["reason"]
    assert lines["large.png"]["verdict"] == "uncalibrated"
    coverage = json.loads((tmp_path / "out" / "coverage.json").read_text())
    assert (coverage["files"], coverage["files_scored"], coverage["frames_wanted"]) == (4, 2, 6)
    assert [name.split("/")[-1] for name in coverage["left_out"]] == ["notes.txt"]
    assert not list((tmp_path / "out").glob("*unfinished*"))


def test_workers_and_batches_change_nothing(run, tmp_path, seed):
    files = [write_rgb(tmp_path / "in" / f"{i}.png", noise(seed + i)) for i in range(5)]
    detector = masm_detect.load_detector(run, "cpu")
    one = detector.predict(files, batch_size=1, workers=0, precision="fp32")
    two = detector.predict(files, batch_size=7, workers=2, precision="fp32")
    assert [r.file for r in one] == [r.file for r in two] == [str(f) for f in files]
    for a, b in zip(one, two):
        assert [r.box for r in a.rows] == [r.box for r in b.rows]
        assert [r.logit for r in a.rows] == pytest.approx([r.logit for r in b.rows], abs=1e-5)


def test_a_killed_command_goes_on(run, tmp_path, seed, monkeypatch):
    files = [write_rgb(tmp_path / "in" / f"{i}.png", noise(seed + i)) for i in range(4)]
    whole = predict(run, files, tmp_path / "whole", progress=False)
    real, read = predict_module.TrainedDetector.score_files, []

    def dying(self, todo, options, **more):
        for number, result in enumerate(real(self, todo, ScoreOptions(batch_size=1), **more)):
            if number == 2:
                raise KeyboardInterrupt
            read.append(result.file)
            yield result

    monkeypatch.setattr(predict_module.TrainedDetector, "score_files", dying)
    with pytest.raises(KeyboardInterrupt):
        predict(run, files, tmp_path / "out", progress=False)
    journal = tmp_path / "out" / "unfinished.jsonl"
    journal.write_text(journal.read_text() + '{"key": "cut o')  # killed within a line
    monkeypatch.setattr(predict_module.TrainedDetector, "score_files", real)
    with pytest.raises(ConfigError, match="other settings"):
        predict(run, files, tmp_path / "out", ScoreOptions(tiles=1), progress=False)
    seen = []

    def counting(self, todo, options, **more):
        seen.extend(map(str, todo))
        return real(self, todo, options, **more)

    monkeypatch.setattr(predict_module.TrainedDetector, "score_files", counting)
    again = predict(run, files, tmp_path / "out", progress=False)
    assert seen == [str(f) for f in files[2:]] and len(read) == 2
    assert [len(r.rows) for r in again.files] == [len(r.rows) for r in whole.files]
    assert [r.p_fake for r in again.files] == pytest.approx([r.p_fake for r in whole.files], abs=1e-6)
    with pytest.raises(ConfigError, match="already holds results"):
        predict(run, files, tmp_path / "out", progress=False)
    predict(run, files[:1], tmp_path / "out", overwrite=True, progress=False)


def test_faces_of_a_photograph(tmp_path):
    run = tiny_run(tmp_path, face_recipe())
    photograph = write_rgb(tmp_path / "a.png", face_photograph())
    (result,) = masm_detect.load_detector(run, "cpu").predict(photograph)
    (row,) = result.rows
    x0, y0, x1, y1 = row.box
    assert result.track == row.track == 1 and 150 < x0 < x1 < 320 and 30 < y0 < y1 < 260


def rows_of(**tracks):
    """Rows of persons, each in the first frames; `tracks`: P(fake) in them."""
    return [
        ScoreRow("v", 0.0, p, frame=frame, track=int(name[1:]))
        for name, scores in tracks.items()
        for frame, p in enumerate(scores)
    ]


def test_the_person_with_the_highest_mean_decides():
    rows = rows_of(p1=[0.2] * 8, p2=[0.6, 0.8], p3=[0.99])
    assert deciding_track(rows) == (2, pytest.approx(0.7), 2)  # 3 is in 1 of 8 frames
    assert deciding_track([ScoreRow("v", 0.0, p) for p in (0.1, 0.3)]) == (None, pytest.approx(0.2), 1)


def test_a_person_who_is_lost_again_and_again_is_no_crowd():
    rows = [ScoreRow("v", 0.0, 0.1 * (i % 7), frame=i, track=i // 2) for i in range(20)]  # 2 of 20 frames each
    assert deciding_track(rows) == (None, pytest.approx(np.mean([row.p_fake for row in rows])), 1)


def test_interrupted_before_the_first_result_and_again(run, tmp_path, seed, monkeypatch):
    files = [write_rgb(tmp_path / "in" / f"{i}.png", noise(seed + i)) for i in range(3)]
    real = predict_module.TrainedDetector.score_files

    def dying_after(count):
        def dying(self, todo, options, **more):
            for number, result in enumerate(real(self, todo, ScoreOptions(batch_size=1), **more)):
                if number == count:
                    raise KeyboardInterrupt
                yield result

        return dying

    for count in (0, 1):
        monkeypatch.setattr(predict_module.TrainedDetector, "score_files", dying_after(count))
        with pytest.raises(KeyboardInterrupt):
            predict(run, files, tmp_path / "out", progress=False)
    monkeypatch.setattr(predict_module.TrainedDetector, "score_files", real)
    assert len(predict(run, files, tmp_path / "out", progress=False).files) == 3
    # results are replaced, and a command that does so can be continued
    monkeypatch.setattr(predict_module.TrainedDetector, "score_files", dying_after(1))
    with pytest.raises(KeyboardInterrupt):
        predict(run, files, tmp_path / "out", overwrite=True, progress=False)
    assert not (tmp_path / "out" / "coverage.json").exists()
    seen = []

    def counting(self, todo, options, **more):
        seen.extend(todo)
        return real(self, todo, options, **more)

    monkeypatch.setattr(predict_module.TrainedDetector, "score_files", counting)
    predict(run, files, tmp_path / "out", overwrite=True, progress=False)
    assert seen == files[1:]


def test_an_image_that_does_not_fit_is_skipped_with_a_reason(tmp_path, seed):
    from dataclasses import replace

    import tiny
    from masm_detect.training.run import train

    data = tiny.write_data(tmp_path / "data")
    tiny.detector().backbone.model.save_pretrained(tmp_path / "backbone")
    config = tiny.run_config(data, tmp_path / "backbone", tmp_path / "run", "probe")
    train(replace(config, data=replace(config.data, crop="center")))
    small, whole = (
        write_rgb(tmp_path / "s.png", noise(seed, 20, 20)),
        write_rgb(tmp_path / "w.png", noise(seed, 30, 30)),
    )
    bad, good = masm_detect.load_detector(tmp_path / "run", "cpu").predict([small, whole], as_is=True)
    assert bad.p_fake is None and "20x20" in bad.reason
    assert good.p_fake is not None


def test_what_a_run_must_have(tmp_path):
    run = tiny_run(tmp_path, None)
    picture = write_image(tmp_path / "a.png")
    with pytest.raises(PredictError, match=r"crops\.json.*--as-is"):
        masm_detect.load_detector(run, "cpu").predict(picture)
    assert masm_detect.load_detector(run, "cpu").predict(picture, as_is=True)[0].p_fake is not None


def test_another_face_detector_is_refused(tmp_path):
    from masm_detect.data.crop_recipe import CropRecipe

    run = tiny_run(tmp_path, CropRecipe("face", 64, 1.3, "retinaface", "largest"))
    with pytest.raises(PredictError, match="found by retinaface"):
        masm_detect.load_detector(run, "cpu").predict(write_image(tmp_path / "a.png"))


def test_command(run, tmp_path, capsys, seed):
    write_rgb(tmp_path / "a.png", noise(seed))
    (tmp_path / "b.png").write_bytes(b"")
    write_rgb(tmp_path / "clip [dqw4w9] [/b].png", noise(seed))
    out = ["--out", str(tmp_path / "p"), "--device", "cpu"]
    assert code_of(["predict", str(run), str(tmp_path / "a.png"), *out]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 files scored" in printed and "uncalibrated" in printed
    assert code_of(["predict", str(run), str(tmp_path / "a.png"), str(tmp_path / "b.png"), *out, "--overwrite"]) == 3
    assert "b.png is empty" in capsys.readouterr().out
    for arguments, message in (
        ([str(run), str(tmp_path / "none.png")], "none.png does not exist"),
        ([str(tmp_path), str(tmp_path / "a.png")], "does not exist: is"),
        ([str(run), str(tmp_path / "a.png"), "--faces", "some"], "faces"),
    ):
        assert code_of(["predict", *arguments, "--out", str(tmp_path / "q")]) == 2
        assert_one_line(capsys.readouterr().err, message)


def test_full_disk_is_one_sentence(run, tmp_path, capsys, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "scores.csv")

    monkeypatch.setattr(predict_module, "write_scores", full)
    picture = write_image(tmp_path / "a.png")
    assert code_of(["predict", str(run), str(picture), "--out", str(tmp_path / "p"), "--device", "cpu"]) == 2
    assert_one_line(capsys.readouterr().err, "make room")
    assert (tmp_path / "p" / "unfinished.jsonl").is_file()
