"""Comparing score files: what is matched, seeds, verdicts, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.evaluation.comparison import CANNOT, MEAN, compare
from masm_detect.evaluation.score_sets import CompareError, load_detectors, match
from score_files import read_csv, write_csv, write_runs
from sklearn.metrics import roc_auc_score


def judged(content):
    return [row for row in content["comparisons"] if row["level"] == content["level"]]


def test_a_better_detector_is_found_and_equal_ones_are_not_told_apart(tmp_path, seed):
    files = write_runs(tmp_path, seed, {"good": 4.0, "poor": 0.5})
    (row,) = judged(compare(files))
    assert (row["a"], row["b"], row["verdict"]) == ("good", "poor", "good is better")
    assert row["p_holm"] == row["p"] < 0.01 and row["interval"][0] > 0
    (tmp_path / "copy.csv").write_text((tmp_path / "poor.csv").read_text())
    (same,) = judged(compare([files[1], str(tmp_path / "copy.csv")]))
    assert same["difference"] == 0 and same["verdict"] == CANNOT


def test_numbers_by_image_and_by_video(tmp_path, seed):
    files = write_runs(tmp_path, seed, {"a": 1.5, "b": 1.0})
    content = compare(files)
    assert content["level"] == "video" and content["datasets"]["one"]["video"] == {
        "n_real": 30, "n_fake": 30, "n_real_groups": 30, "n_fake_groups": 30,
    }  # fmt: skip
    for row in content["comparisons"]:
        for side, file in zip("ab", files):
            read = read_csv(file)
            labels, scores = np.array([int(r["label"]) for r in read]), np.array([float(r["score"]) for r in read])
            if row["level"] == "video":  # two frames each, in order
                labels, scores = labels[::2], scores.reshape(-1, 2).mean(axis=1)
            assert row[f"auc_{side}"] == pytest.approx(roc_auc_score(labels, scores))
    images = [row for row in content["comparisons"] if row["level"] == "image"]
    assert len(images) == 1 and images[0]["verdict"] is images[0]["p_holm"] is None


def test_single_images_are_compared_once(tmp_path, seed):
    content = compare(write_runs(tmp_path, seed, {"a": 1.0, "b": 1.0}, frames=1))
    assert content["level"] == "image" and len(content["comparisons"]) == 1


def test_order_of_rows_does_not_matter(tmp_path, seed):
    files = write_runs(tmp_path, seed, {"a": 1.0, "b": 1.3})
    before = judged(compare(files))
    rows = [tuple(row.values()) for row in read_csv(tmp_path / "b.csv")]
    np.random.default_rng(seed).shuffle(rows)
    write_csv(tmp_path / "b.csv", ("path", "label", "score", "dataset", "method", "video", "group"), rows)
    (after,) = judged(compare(files))
    for name in ("auc_a", "auc_b", "difference", "error"):
        assert after[name] == pytest.approx(before[0][name])


def test_a_file_without_videos_is_compared_with_the_videos_of_ours(tmp_path, seed):
    files = write_runs(tmp_path, seed, {"ours": 2.0, "b": 1.0})
    theirs = [(row["path"], row["label"], row["score"]) for row in read_csv(tmp_path / "b.csv")]
    write_csv(tmp_path / "theirs.csv", ("image", "y_true", "prob"), theirs)
    for order in ([files[0], str(tmp_path / "theirs.csv")], [str(tmp_path / "theirs.csv"), files[0]]):
        (row,) = judged(compare(order))
        assert row["level"] == "video" and row["n_real"] == 30 and row["n_real_groups"] == 30
    (plain,) = judged(compare(files))
    assert abs(row["difference"]) == pytest.approx(abs(plain["difference"]))


def test_pairs(tmp_path, seed):
    files = write_runs(tmp_path, seed, dict.fromkeys("abcde", 1.0), frames=1)

    def pairs(content):
        return [(row["a"], row["b"]) for row in judged(content)]

    assert pairs(compare(files[:3])) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs(compare(files)) == [("b", "a"), ("c", "a"), ("d", "a"), ("e", "a")]
    assert pairs(compare(files[:3], baseline="c")) == [("a", "c"), ("b", "c")]
    with pytest.raises(CompareError, match="baseline is 'x'; it must be one of a, b"):
        compare(files[:2], baseline="x")


def test_holm_counts_every_verdict(tmp_path, seed):
    files = write_runs(tmp_path, seed, {"a": 1.0, "b": 1.2, "c": 1.4}, sets=("one", "two"))
    content = compare(files)
    rows = judged(content)
    assert [row["dataset"] for row in rows[:3]] == ["one", "two", MEAN] and len(rows) == 9
    smallest = min(rows, key=lambda row: row["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, 9 * smallest["p"]))
    for row in rows:
        low, high = row["interval_holm"]
        assert (row["verdict"] == CANNOT) == (low <= 0 <= high)
        if row["dataset"] == MEAN:
            parts = [r for r in rows if (r["a"], r["b"]) == (row["a"], row["b"]) and r["dataset"] != MEAN]
            assert row["difference"] == pytest.approx(np.mean([part["difference"] for part in parts]))


def test_few_groups_give_no_verdict(tmp_path, seed):
    (row,) = judged(compare(write_runs(tmp_path, seed, {"good": 9.0, "poor": 0.0}, videos=12)))
    assert row["verdict"] == "too few independent groups (12) to compare"
    assert row["p"] is row["interval"] is row["p_holm"] is None


def test_seeds_are_grouped_by_name_and_on_request(tmp_path, seed):
    names = ("m-seed2", "m-seed10", "lora_seed2", "lora_seed10", "probe")
    files = write_runs(tmp_path, seed, dict.fromkeys(names, 1.0))
    content = compare(files)
    assert {n: [r["seed"] for r in one["runs"]] for n, one in content["detectors"].items()} == {
        "m": [2, 10], "lora": [2, 10], "probe": [None],
    }  # fmt: skip
    rows = {(row["a"], row["b"]): row for row in judged(content)}
    assert rows["m", "lora"]["paired_seeds"] and len(rows["m", "lora"]["per_seed"]) == 2
    assert not rows["m", "probe"]["paired_seeds"] and rows["m", "probe"]["seeds"] == [2, 1]
    auc = content["detectors"]["m"]["auc"]["video"]["one"]
    assert auc["mean"] == pytest.approx(np.mean(auc["per_seed"])) and auc["sd"] > 0
    assert "one run: probe" in content["notes"][-1]
    grouped = compare(files[4:], group=[f"all={','.join(files[:4])}"])
    (row,) = judged(grouped)
    assert row["seeds"] == [1, 4] and (row["a"], row["b"]) == ("probe", "all")
    (one, other) = load_detectors(files[:1] + files[2:3])
    assert (one.name, other.name) == ("m-seed2", "lora_seed2")  # a seed alone is no group


def test_different_samples_are_counted(tmp_path, seed):
    files = write_runs(tmp_path, seed, {"a": 1.0, "b": 1.0}, videos=40)
    rows = [tuple(row.values()) for row in read_csv(tmp_path / "b.csv")]
    columns = ("path", "label", "score", "dataset", "method", "video", "group")
    write_csv(tmp_path / "b.csv", columns, rows[3:])
    with pytest.raises(CompareError, match=r"of 160 in all, b lacks 3 \(one/real/000/0.png, .*--intersect"):
        compare(files)
    content = compare(files, intersect=True)
    assert content["left_out"] == {"a": 3, "b": 0} and "157 samples are in all runs" in content["notes"][0]
    (expected,) = judged(compare(files, intersect=True, variance="delong"))
    assert judged(content)[0]["difference"] == expected["difference"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows, rows[0]], "b.csv lists one/real/000/0.png twice"),
        (lambda rows: [(r[0], 1 - int(r[1]), *r[2:]) for r in rows], "is real in one score file and fake in another"),
        (lambda rows: [("x" + r[0], *r[1:]) for r in rows], "no sample is in all runs"),
        (lambda rows: [(r[0], "", *r[2:]) for r in rows], None),  # labels of one file are enough
    ],
)
def test_what_does_not_match_is_named(tmp_path, seed, change, message):
    files = write_runs(tmp_path, seed, {"a": 1.0, "b": 1.0})
    rows = change([tuple(row.values()) for row in read_csv(tmp_path / "b.csv")])
    write_csv(tmp_path / "b.csv", ("path", "label", "score", "dataset", "method", "video", "group"), rows)
    detectors = load_detectors(files)
    if message is None:
        assert {s.label for s in match(detectors).samples} == {0, 1}
        return
    with pytest.raises(CompareError, match=message):
        match(detectors, intersect=True)


def test_mistakes_in_the_call(tmp_path, seed):
    files = write_runs(tmp_path, seed, {"a-seed1": 1.0, "a-seed2": 1.0})
    with pytest.raises(CompareError, match=r"needs two detectors, and this is one: a \(2 seeds\)"):
        compare(files)
    with pytest.raises(CompareError, match="is named twice"):
        compare([files[0], files[0]])
    with pytest.raises(CompareError, match="it must be NAME=EVAL"):
        compare(files, group=["x"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CompareError, match="empty holds no results"):
        compare([str(tmp_path / "empty"), files[0]])


def test_a_data_set_of_one_class_is_noted(tmp_path, seed):
    files = write_runs(tmp_path, seed, {"a": 1.0, "b": 1.0}, sets=("one", "two"))
    for file in files:
        rows = [tuple(r.values()) for r in read_csv(file) if r["dataset"] == "one" or r["label"] == "0"]
        write_csv(tmp_path / file, ("path", "label", "score", "dataset", "method", "video", "group"), rows)
    content = compare(files)
    assert [row["dataset"] for row in judged(content)] == ["one"]
    assert content["notes"][0] == "not compared, because they hold one class only: two"
