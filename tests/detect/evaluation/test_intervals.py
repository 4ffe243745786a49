"""Bootstrap intervals over groups."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.data.sample import Sample
from masm_detect.evaluation.compare import compare_scores
from masm_detect.evaluation.intervals import MIN_CLUSTERS, group_weights, weighted_auc
from masm_detect.evaluation.metrics import (
    evaluate_scores,
)
from sklearn.metrics import roc_auc_score


def make(n_videos=40, frames=5, methods=("A", "B"), dataset="D", shift=0.15, noise=0.1, seed=0):
    """Real videos and as many fakes of each method; frames of a video share an offset, fakes are shifted up."""
    rng = np.random.default_rng(seed)
    samples, scores = [], []
    for method in ("real", *methods):
        label = int(method != "real")
        for v in range(n_videos):
            offset = rng.normal(0.4 + shift * label, noise)
            for f in range(frames):
                folder = f"fake-{method}" if label else "real"
                path, video = f"{dataset}/{folder}/{v}/{f}.png", f"{dataset}/{folder}/{v}"
                samples.append(Sample(path, label, dataset, method, video, "test", f"{dataset}/{v}"))
                scores.append(np.clip(offset + rng.normal(0, 0.05), 0, 1))
    return samples, np.round(scores, 2)  # rounded: ties


def test_weighted_auc_equals_an_explicit_resample():
    samples, scores = make(n_videos=7, frames=3)
    labels, groups = np.array([s.label for s in samples]), [s.group for s in samples]
    counts, place = group_weights(groups, labels, 20, 0, min_clusters=2)
    values = weighted_auc(labels, scores, (counts, place))
    for row, value in zip(counts, values):
        repeat = row[place].astype(int)
        assert value == pytest.approx(roc_auc_score(np.repeat(labels, repeat), np.repeat(scores, repeat)), abs=1e-12)


def test_interval_covers_and_is_wider_when_clustered():
    samples, scores = make(n_videos=30, frames=10)
    m = evaluate_scores(samples, scores, n_bootstrap=500)["datasets"]["D"]["all"]
    assert m["auc_ci"][0] < m["auc"] < m["auc_ci"][1]
    # Frames taken for independent: an interval that is far too narrow.
    loose = [Sample(s.path, s.label, s.dataset, s.method, s.video, "test", s.path) for s in samples]
    n = evaluate_scores(loose, scores, n_bootstrap=500)["datasets"]["D"]["all"]
    width = lambda x: x["auc_ci"][1] - x["auc_ci"][0]  # noqa: E731
    assert width(m) > 1.5 * width(n)


def test_interval_coverage():
    """Of 60 data sets drawn alike, about 95% of the intervals hold the true AUC."""
    truth = evaluate_scores(*make(n_videos=4000, frames=1, methods=("A",), seed=99), n_bootstrap=0)["datasets"]["D"][
        "all"
    ]["auc"]
    hits = 0
    for seed in range(60):
        low, high = evaluate_scores(*make(40, 3, ("A",), seed=seed), n_bootstrap=200)["datasets"]["D"]["all"]["auc_ci"]
        hits += low <= truth <= high
    assert hits >= 50


def test_same_seed_same_interval():
    samples, scores = make()
    a, b, c = (
        evaluate_scores(samples, scores, n_bootstrap=100, seed=s)["datasets"]["D"]["all"]["auc_ci"] for s in (0, 0, 1)
    )
    assert a == b != c


def test_classes_in_groups_of_their_own():
    """Real and fake videos that share no group: every resample still has both classes."""
    samples, scores = make(n_videos=MIN_CLUSTERS, frames=2, methods=("A",))
    apart = [Sample(s.path, s.label, s.dataset, s.method, s.video) for s in samples]
    m = evaluate_scores(apart, scores, n_bootstrap=300)["datasets"]["D"]["all"]
    assert m["n_groups"] == 2 * MIN_CLUSTERS and m["n_real_groups"] == m["n_fake_groups"] == MIN_CLUSTERS
    assert np.isfinite(m["auc_ci"]).all()


@pytest.mark.parametrize("n_videos", [1, 2, MIN_CLUSTERS - 1])
def test_few_groups_have_no_interval(n_videos):
    samples, scores = make(n_videos=n_videos)
    m = evaluate_scores(samples, scores, n_bootstrap=100)["datasets"]["D"]["all"]
    assert m["auc"] is not None and m["auc_ci"] is None and m["video_auc_ci"] is None
    assert m["n_groups"] == m["n_real_groups"] == n_videos
    assert compare_scores(samples, scores, scores, n_bootstrap=50)["difference_ci"] is None


def test_groups_are_counted_in_each_class():
    """Many groups of fakes do not make up for few groups of reals."""
    samples, scores = make(n_videos=20, frames=1, methods=("A",))
    keep = [i for i, s in enumerate(samples) if s.label or int(s.video.rsplit("/", 1)[1]) < 3]
    m = evaluate_scores([samples[i] for i in keep], scores[keep], n_bootstrap=50)["datasets"]["D"]["all"]
    assert (m["n_real_groups"], m["n_fake_groups"]) == (3, 20) and m["auc_ci"] is None
