"""Score files: what is written is read back; files of other programs; what is refused."""

import numpy as np
import pytest
from masm_detect.data.sample import Sample
from masm_detect.evaluation.score_file import (
    ScoreFileError,
    ScoreRow,
    labelled,
    log_odds,
    read_scores,
    scored_samples,
    sigmoid,
    write_scores,
    write_videos,
)
from score_files import read_csv


def test_rows_are_read_as_written(tmp_path):
    rows = [
        ScoreRow("a, b.png", -1.25, sigmoid(-1.25)),
        ScoreRow("v.mp4", 3.5, sigmoid(3.5), 1, "set", "swap", "set/swap/v", "g", 17, 0.68, 2, (1.0, 2.5, 30.0, 41.5)),
        ScoreRow("zero.png", 0.0, 0.5, 0),
    ]
    write_scores(tmp_path / "scores.csv", rows)
    read = read_scores(tmp_path / "scores.csv")
    assert [r.p_fake for r in read] == pytest.approx([r.p_fake for r in rows], rel=1e-8)
    for a, b in zip(read, rows):
        assert {n: getattr(a, n) for n in ("file", "label", "video", "frame", "seconds", "track", "box")} == {
            n: getattr(b, n) for n in ("file", "label", "video", "frame", "seconds", "track", "box")
        }


def test_scores_of_samples_survive_the_file(tmp_path, seed):
    rng = np.random.default_rng(seed)
    samples = [Sample(f"{i}.png", i % 2, "d", "real" if i % 2 == 0 else "m", f"d/x/{i // 3}") for i in range(12)]
    logits = rng.normal(0, 4, 12).astype(np.float32)
    write_scores(tmp_path / "s.csv", scored_samples(samples, logits))
    again, scores = labelled(read_scores(tmp_path / "s.csv"), "s")
    assert again == samples
    assert scores == pytest.approx(1 / (1 + np.exp(-logits.astype(float))), rel=1e-7)


@pytest.mark.parametrize(
    ("header", "row", "label", "p"),
    [
        ("path,y_true,y_score", "x.png,1,0.75", 1, 0.75),
        ("Image,Label,Prob", "x.png,real,0.25", 0, 0.25),
        ("file,logit", "x.png,0", None, 0.5),
        ("\ufefffilename,is_fake,score", "x.png,True,1", 1, 1.0),
    ],
)
def test_files_of_other_programs(tmp_path, header, row, label, p):
    (tmp_path / "theirs.csv").write_text(f"{header}\n{row}\n", encoding="utf-8")
    (read,) = read_scores(tmp_path / "theirs.csv")
    assert (read.file, read.label, read.p_fake) == ("x.png", label, p)
    assert read.logit == pytest.approx(log_odds(p))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "needs `file`"),
        ("file,p_fake\n", "no score"),
        ("file,colour\nx,1\n", "needs `file`"),
        ("file,p_fake\nx,1.2\n", "name the column logit"),
        ("file,p_fake\nx,nan\n", "finite"),
        ("file,p_fake\nx,\n", "line 2: x has no score"),
        ("file,p_fake,label\nx,0.5,maybe\n", "must be 0"),
    ],
)
def test_what_is_refused(tmp_path, text, part):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ScoreFileError, match=part):
        read_scores(tmp_path / "bad.csv")


def test_metrics_need_labels():
    with pytest.raises(ScoreFileError, match="no label for x"):
        labelled([ScoreRow("x", 0.0, 0.5)], "theirs")


def test_equal_names_of_videos_of_two_methods_are_two_videos():
    rows = [ScoreRow(f"{m}/0.png", 0.0, 0.5, int(m != "r"), "d", m, video="000") for m in ("r", "a", "b")]
    samples, _ = labelled(rows, "theirs")
    assert [s.video for s in samples] == ["d/real/000", "d/a/000", "d/b/000"]
    assert {s.group for s in samples} == {"000"}  # a real video and its forgeries are left out together


def test_videos_have_the_mean_of_their_frames(tmp_path, seed):
    scores = np.random.default_rng(seed).random(6)
    samples = [
        Sample(f"{i}.png", i % 2, "d", "real" if i % 2 == 0 else "m", f"d/{i % 2}/v", group="g") for i in range(6)
    ]
    write_videos(tmp_path / "videos.csv", samples, scores)
    real, fake = read_csv(tmp_path / "videos.csv")
    assert real == {
        "dataset": "d", "method": "real", "label": "0", "video": "d/0/v", "group": "g", "frames": "3",
        "p_fake": str(np.mean(scores[::2])),
    }  # fmt: skip
    assert float(fake["p_fake"]) == np.mean(scores[1::2])
