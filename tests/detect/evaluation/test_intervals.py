"""Jackknife intervals over groups."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.data.sample import Sample
from masm_detect.evaluation.compare import compare_scores
from masm_detect.evaluation.intervals import MIN_CLUSTERS, auc_interval, leave_one_out
from masm_detect.evaluation.metrics import evaluate_scores
from scipy.stats import norm
from scored_videos import make
from sklearn.metrics import roc_auc_score


def test_each_group_is_left_out():
    samples, scores = make(n_videos=7, frames=3)
    labels, groups = np.array([s.label for s in samples]), np.array([s.group for s in samples], dtype="U40")
    groups[:3] = "a group with real samples only"
    values = leave_one_out(groups, labels, scores, min_clusters=2)
    assert values.auc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    names = np.unique(groups)
    assert len(names) == len(values.kind) == len(values.without) == 8
    for name, kind, value in zip(names, values.kind, values.without):
        keep = groups != name
        assert value == pytest.approx(roc_auc_score(labels[keep], scores[keep]), abs=1e-12)
        assert kind == {"a group with real samples only": 0, "D/0": 1}.get(name, 2)


def draw(rng, auc, groups, frames, correlation, paired):
    """Labels, scores and groups of normal scores whose AUC over independent groups is `auc`."""
    shift = norm.ppf(auc) * np.sqrt(2)
    names = np.arange(groups if paired else 2 * groups)
    offset = rng.normal(0, np.sqrt(correlation), len(names))
    place = np.repeat(names, 2 * frames if paired else frames)
    labels = np.tile(np.repeat([0, 1], frames), groups) if paired else (place < groups).astype(int)
    scores = shift * labels + offset[place] + rng.normal(0, np.sqrt(1 - correlation), len(place))
    return labels, scores, place


@pytest.mark.parametrize("paired", [False, True], ids=["one class a group", "both classes in a group"])
@pytest.mark.parametrize(("frames", "correlation"), [(1, 0.0), (6, 0.6)])
@pytest.mark.parametrize("groups", [8, 20, 50, 100])
@pytest.mark.parametrize("auc", [0.6, 0.75, 0.89, 0.97])
def test_intervals_hold_what_they_promise(auc, groups, frames, correlation, paired, seed):
    """Of 400 data sets drawn alike, 93% to 97% of the intervals hold the true AUC, or none is printed.

    The standard error of a coverage from 400 draws is .011: the bounds allow two and a half of it. Single samples with
    few errors are covered up to 98% of the time: the jackknife is conservative there.
    """
    rng = np.random.default_rng(seed)
    found = [auc_interval(g.astype(str), y, x) for y, x, g in
             (draw(rng, auc, groups, frames, correlation, paired) for _ in range(400))]  # fmt: skip
    found = [interval for interval in found if interval is not None]
    if groups < MIN_CLUSTERS:
        assert found == []
        return
    coverage = np.mean([low <= auc <= high for low, high in found])
    highest = 0.97 if frames > 1 else 0.98
    assert 0.93 - 0.027 <= coverage <= highest + 0.018, coverage


def test_few_groups_of_both_classes_beside_many_of_one(seed):
    """A kind of groups with few members counts, and a group that dominates leaves no interval."""
    rng = np.random.default_rng(seed)
    place = np.r_[np.repeat(np.arange(40), 5), np.repeat([40, 41], 20)]
    labels = np.r_[np.repeat([0, 1], 100), np.tile([0] * 10 + [1] * 10, 2)]
    hits = []
    for _ in range(400):
        offset = rng.normal(0, np.sqrt(0.6), 42)
        scores = norm.ppf(0.8) * np.sqrt(2) * labels + offset[place] + rng.normal(0, np.sqrt(0.4), len(place))
        low, high = auc_interval(place.astype(str), labels, scores)
        hits.append(low <= 0.8 <= high)
    assert np.mean(hits) >= 0.93 - 0.03
    place[-40:] = 40
    place, labels = np.r_[place, np.full(60, 40)], np.r_[labels, np.repeat([0, 1], 30)]
    assert auc_interval(place.astype(str), labels, rng.normal(size=len(place))) is None


def test_perfect_separation_has_no_interval():
    groups = np.arange(60).astype(str)
    labels = np.r_[np.zeros(30, int), np.ones(30, int)]
    assert auc_interval(groups, labels, labels * 0.5) is None
    assert auc_interval(groups, labels, np.arange(60) / 60) is None
    assert auc_interval(groups, labels, np.full(60, 0.5)) == [0.5, 0.5]  # scores that never differ vary nowhere


def test_interval_is_wider_when_clustered():
    samples, scores = make(n_videos=30, frames=10)
    m = evaluate_scores(samples, scores)["datasets"]["D"]["all"]
    assert m["auc_ci"][0] < m["auc"] < m["auc_ci"][1]
    # Frames taken for independent: an interval that is far too narrow.
    loose = [Sample(s.path, s.label, s.dataset, s.method, s.video, "test", s.path) for s in samples]
    n = evaluate_scores(loose, scores)["datasets"]["D"]["all"]
    width = lambda x: x["auc_ci"][1] - x["auc_ci"][0]  # noqa: E731
    assert width(m) > 1.5 * width(n)


def test_classes_in_groups_of_their_own():
    """Real and fake videos that share no group: each class varies on its own."""
    samples, scores = make(n_videos=MIN_CLUSTERS, frames=2, methods=("A",))
    apart = [Sample(s.path, s.label, s.dataset, s.method, s.video) for s in samples]
    m = evaluate_scores(apart, scores)["datasets"]["D"]["all"]
    assert m["n_groups"] == 2 * MIN_CLUSTERS and m["n_real_groups"] == m["n_fake_groups"] == MIN_CLUSTERS
    assert np.isfinite(m["auc_ci"]).all()


@pytest.mark.parametrize("n_videos", [1, 2, MIN_CLUSTERS - 1])
def test_few_groups_have_no_interval(n_videos):
    samples, scores = make(n_videos=n_videos)
    m = evaluate_scores(samples, scores)["datasets"]["D"]["all"]
    assert m["auc"] is not None and m["auc_ci"] is None and m["video_auc_ci"] is None
    assert m["n_groups"] == m["n_real_groups"] == n_videos
    assert compare_scores(samples, scores, scores)["difference_ci"] is None


def test_groups_are_counted_in_each_class():
    """Many groups of fakes do not make up for few groups of reals."""
    samples, scores = make(n_videos=MIN_CLUSTERS, frames=1, methods=("A",))
    keep = [i for i, s in enumerate(samples) if s.label or int(s.video.rsplit("/", 1)[1]) < 3]
    m = evaluate_scores([samples[i] for i in keep], scores[keep])["datasets"]["D"]["all"]
    assert (m["n_real_groups"], m["n_fake_groups"]) == (3, MIN_CLUSTERS) and m["auc_ci"] is None
