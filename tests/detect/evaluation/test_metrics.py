"""Metrics against scikit-learn, the two video keys, and scores that cannot be evaluated."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from masm_detect.evaluation.metrics import (
    METRICS,
    MetricsError,
    calibration_error,
    equal_error_rate,
    evaluate_scores,
    reliability,
    tpr_at_fpr,
    video_scores,
)
from masm_detect.report.tables import results_table
from scored_videos import make
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve


def test_numbers_equal_scikit_learn():
    samples, scores = make()
    labels = np.array([s.label for s in samples])
    result = evaluate_scores(samples, scores)
    whole = result["datasets"]["D"]["all"]
    assert whole["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert whole["ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert whole["accuracy"] == pytest.approx(np.mean((scores >= 0.5) == labels))
    assert (whole["n_real"], whole["n_fake"], whole["n_real_videos"], whole["n_fake_videos"]) == (200, 400, 40, 80)
    only_b = [s.method in ("real", "B") for s in samples]
    assert result["datasets"]["D"]["methods"]["B"]["auc"] == pytest.approx(
        roc_auc_score(labels[only_b], scores[only_b])
    )
    videos = {s.video: s.label for s in samples}
    means = {v: np.mean([p for s, p in zip(samples, scores) if s.video == v]) for v in videos}
    expected = roc_auc_score(list(videos.values()), [means[v] for v in videos])
    assert whole["video_auc"] == pytest.approx(expected)
    json.dumps(result, allow_nan=False)


def test_datasets_are_kept_apart():
    a, b = make(dataset="A", seed=1), make(dataset="B", seed=2, shift=0.0)
    samples, scores = a[0] + b[0], np.concatenate([a[1], b[1]])
    mixed = evaluate_scores(samples, scores)["datasets"]
    assert mixed["A"] == evaluate_scores(*a)["datasets"]["A"]
    assert mixed["A"]["all"]["auc"] > 0.7 > 0.6 > mixed["B"]["all"]["auc"]


def test_fast_enough():
    samples, scores = make(n_videos=100, frames=10, methods=("A", "B"))  # 3000 frames
    start = time.perf_counter()
    evaluate_scores(samples, scores)
    assert time.perf_counter() - start < 20  # about 1 s on one idle core


def test_eer_tpr_and_calibration_by_hand():
    labels, scores = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0.1, 0.2, 0.3, 0.8, 0.4, 0.6, 0.7, 0.9])
    assert equal_error_rate(labels, scores) == 0.25
    assert calibration_error(np.array([0, 1]), np.array([0.0, 1.0])) == 0
    assert calibration_error(np.array([0, 0]), np.array([1.0, 1.0])) == 1


def test_eer_lies_on_the_line_between_two_thresholds():
    assert equal_error_rate(np.array([0, 1]), np.array([0.3, 0.3])) == 0.5  # constant scores are guesses
    assert equal_error_rate(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9])) == 0
    assert equal_error_rate(np.array([1, 1, 0, 0]), np.array([0.1, 0.2, 0.8, 0.9])) == 1
    # thresholds at (FPR, TPR) = (0, 1/3), (1, 1): FPR = 1 - TPR at 0.4
    assert equal_error_rate(np.array([0, 1, 1, 1]), np.array([0.5, 0.5, 0.5, 0.9])) == pytest.approx(0.4)
    rng = np.random.default_rng()
    for _ in range(50):  # against a fine grid on the same lines
        labels = np.r_[0, 1, rng.integers(0, 2, rng.integers(1, 30))]
        scores = rng.integers(0, 8, len(labels)) / 8
        fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
        place = np.linspace(0, len(fpr) - 1, 200_001)
        x, y = (np.interp(place, np.arange(len(fpr)), values) for values in (fpr, tpr))
        assert equal_error_rate(labels, scores) == pytest.approx(x[np.argmin(np.abs(x + y - 1))], abs=1e-3)


def test_tpr_at_one_percent_needs_a_hundred_reals():
    labels = np.r_[np.zeros(100, int), np.ones(4, int)]
    scores = np.r_[np.linspace(0, 0.5, 99), 0.8, 0.6, 0.7, 0.75, 0.9]
    assert tpr_at_fpr(labels, scores) == 1.0  # one false alarm of 100 is allowed
    assert tpr_at_fpr(labels[1:], scores[1:]) is None


def test_dfb_compat_merges_equal_folder_names():
    samples, scores = make(n_videos=10, methods=("A", "B"))
    keys, labels, _, _ = video_scores(samples, scores, "dfb-compat")
    assert len(keys) == 10 and not labels.any()  # folder names 0..9 of real, A and B merge, and become real
    fakes = [s for s in samples if s.label]
    keys, labels, _, _ = video_scores(fakes, scores[: len(fakes)], "dfb-compat")
    assert len(keys) == 10 and labels.all()
    compat = evaluate_scores(samples, scores, video_key="dfb-compat")["datasets"]["D"]["all"]
    correct = evaluate_scores(samples, scores)["datasets"]["D"]["all"]
    assert compat["video_auc"] is None and correct["video_auc"] is not None
    assert compat["auc"] == correct["auc"]
    with pytest.raises(ValueError, match="video_key must be one of"):
        evaluate_scores(samples, scores, video_key="effort")


def test_bad_scores():
    samples, scores = make()
    with pytest.raises(MetricsError, match=r"each of the 600 samples, got shape \[599\]"):
        evaluate_scores(samples, scores[1:])
    broken = scores.copy()
    broken[3] = np.nan
    with pytest.raises(MetricsError, match=r"1 of 600 scores are not finite, the first of D/real/0/3.png"):
        evaluate_scores(samples, broken)
    with pytest.raises(MetricsError, match="take the sigmoid"):
        evaluate_scores(samples, scores * 10)
    with pytest.raises(MetricsError, match="all 200 samples are real"):
        evaluate_scores(samples[:200], scores[:200])
    with pytest.raises(MetricsError, match="no samples"):
        evaluate_scores([], [])


def test_data_set_of_one_class_beside_a_complete_one():
    a, b = make(dataset="A"), make(dataset="B")
    reals = [i for i, s in enumerate(b[0]) if s.label == 0]
    samples, scores = a[0] + [b[0][i] for i in reals], np.concatenate([a[1], b[1][reals]])
    result = evaluate_scores(samples, scores)["datasets"]
    assert result["A"]["all"]["auc"] is not None
    assert result["B"]["all"]["auc"] is None and result["B"]["all"]["accuracy"] is not None


def test_video_metrics_are_those_of_mean_scores(seed):
    samples, scores = make(n_videos=30, seed=seed)
    found = evaluate_scores(samples, scores)["datasets"]["D"]["all"]
    _, labels, videos, _ = video_scores(samples, scores)
    assert found["video_brier"] == pytest.approx(brier_score_loss(labels, videos))
    assert found["video_ap"] == pytest.approx(average_precision_score(labels, videos))
    assert found["brier"] == pytest.approx(brier_score_loss([s.label for s in samples], scores))
    assert found["video_eer"] == equal_error_rate(labels, videos) and found["video_tpr_at_1fpr"] is None


def test_tpr_at_a_tenth_of_a_percent_needs_a_thousand_reals():
    labels = np.r_[np.zeros(1000, int), np.ones(4, int)]
    scores = np.r_[np.linspace(0, 0.5, 999), 0.8, 0.6, 0.7, 0.75, 0.9]
    assert METRICS["tpr_at_01fpr"].function(labels, scores) == 1.0
    assert METRICS["tpr_at_01fpr"].function(labels[1:], scores[1:]) is None


def test_reliability_by_hand(seed):
    rng = np.random.default_rng(seed)
    scores = np.r_[rng.random(300), 0.0, 1.0]
    labels = (rng.random(302) < scores).astype(int)
    bins = reliability(labels, scores)
    assert len(bins) == 15 and sum(count for count, _, _ in bins) == 302
    for place, (count, mean, share) in enumerate(bins):
        inside = (scores >= place / 15) & ((scores < (place + 1) / 15) | (place == 14))
        assert count == inside.sum() and mean == pytest.approx(scores[inside].mean())
        assert share == pytest.approx(labels[inside].mean())
    expected = sum(count * abs(mean - share) for count, mean, share in bins) / 302
    assert calibration_error(labels, scores) == pytest.approx(expected)


def test_both_video_keys_are_in_the_results_and_the_second_in_the_table_where_it_differs():
    samples, scores = make(n_videos=10)
    for key in ("correct", "dfb-compat"):
        numbers = evaluate_scores(samples, scores, key)["datasets"]["D"]["all"]
        both = numbers["video_auc_by_key"]
        assert both["dfb-compat"] is None and both[key] == numbers["video_auc"]
    headers = [column.header for column in results_table({"run": evaluate_scores(samples, scores)}).columns]
    assert headers[-1] == "dfb-compat"
    renamed = [replace(s, path=s.path.replace("/", "_", 2)) for s in samples]  # folder names that never merge
    headers = [column.header for column in results_table({"run": evaluate_scores(renamed, scores)}).columns]
    assert "dfb-compat" not in headers
