"""Calibration: the guarantee of the thresholds by simulation, the map, and files."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.evaluation.calibration import (
    CalibrationError,
    conformal_bound,
    farthest_of,
    fit_calibration,
    load_calibration,
    neighbour_distance,
    save_calibration,
    unit_length,
)
from masm_detect.evaluation.score_file import log_odds


def scored(random, groups, per_group, label, shift):
    """Correlated logits of `groups` groups of up to `per_group` videos -> (p [V], labels, group names)."""
    sizes = random.integers(1, per_group + 1, groups)
    common = np.repeat(random.normal(0, 1, groups), sizes)
    z = common + random.normal(0, 0.7, sizes.sum()) + shift
    names = np.repeat([f"{label}-{i}" for i in range(groups)], sizes)
    return 1 / (1 + np.exp(-z)), np.full(len(z), label), names


def both(random, groups=60, per_group=4, shift=1.5):
    parts = [scored(random, groups, per_group, 0, -shift), scored(random, groups, per_group, 1, shift)]
    return tuple(np.concatenate(values) for values in zip(*parts))


@pytest.mark.parametrize("groups", [19, 40])
def test_false_alarms_stay_below_the_rate(seed, groups):
    # one video each of new groups; 400 calibrations, 40 new groups each
    random, rate, alarms = np.random.default_rng(seed), 0.05, []
    for _ in range(400):
        p, _, names = scored(random, groups, 6, 0, 0.0)
        bound = conformal_bound(p, names, rate)
        new = random.normal(0, 1, 40) + random.normal(0, 0.7, 40)
        alarms.append((1 / (1 + np.exp(-new)) >= bound).mean())
    error = np.std(alarms) / np.sqrt(len(alarms))
    assert np.mean(alarms) < rate + 3 * error
    assert np.mean(alarms) > rate / 4  # and the bound is not idle


def test_too_few_groups_give_no_bound(seed):
    random = np.random.default_rng(seed)
    for groups, given in ((18, False), (19, True)):
        p, _, names = scored(random, groups, 5, 0, 0.0)
        assert (conformal_bound(p, names, 0.05) is not None) == given


def test_one_video_a_group_is_the_usual_quantile(seed):
    scores = np.random.default_rng(seed).normal(size=99)
    bound = conformal_bound(scores, np.arange(99).astype(str), 0.1)
    assert (scores >= bound).sum() == 9  # (99 + 1) * 0.9 = the 90th smallest score is not reached


def test_the_map_finds_the_logit(seed):
    random = np.random.default_rng(seed)
    z = random.normal(0, 2, 20000)
    labels = (random.random(20000) < 1 / (1 + np.exp(-(0.5 * z - 0.7)))).astype(int)
    p = 1 / (1 + np.exp(-z))
    fitted = fit_calibration(p, labels, [str(i) for i in range(20000)])
    # moved to a mixture of as many real as fake videos
    offset = fitted.offset + log_odds(labels.mean())
    assert (fitted.scale, offset) == (pytest.approx(0.5, abs=0.04), pytest.approx(-0.7, abs=0.07))
    assert fitted.share_of_fakes == labels.mean() != 0.5
    assert fitted.ece_after < 0.02 < fitted.ece_before
    scaled = fit_calibration(p, labels, [str(i) for i in range(20000)], method="temperature")
    assert scaled.offset == pytest.approx(-log_odds(labels.mean()))


def test_verdicts(seed):
    # so close that the thresholds cannot cross (test_crossing_thresholds_leave_a_gap): none of 400 seeds did
    p, labels, names = both(np.random.default_rng(seed), shift=1.0)
    c = fit_calibration(p, labels, names, false_alarm_rate=0.1, miss_rate=0.1)
    assert c.thresholds["real"] < c.thresholds["fake"]
    calibrated = np.array([c.probability(x) for x in p])
    verdicts = np.array([c.verdict(x) for x in p])
    assert (calibrated[verdicts == "likely fake"] >= c.thresholds["fake"]).all()
    assert (calibrated[verdicts == "likely real"] <= c.thresholds["real"]).all()
    assert {"likely fake", "likely real", "unsure"} == set(verdicts)
    # each rate holds on the data itself, up to the weights of groups
    assert ((verdicts == "likely fake") & (labels == 0)).sum() < 0.2 * (labels == 0).sum()


def test_crossing_thresholds_leave_a_gap():
    p = np.concatenate([np.linspace(0.01, 0.05, 30), np.linspace(0.9, 0.99, 30)])
    c = fit_calibration(p, np.repeat([0, 1], 30), [str(i) for i in range(60)])
    assert c.thresholds["fake"] < c.thresholds["real"]
    assert [c.verdict(x) for x in (0.001, 0.5, 0.999)] == ["likely real", "unsure", "likely fake"]


def test_few_groups_give_no_verdict(seed):
    p, labels, names = both(np.random.default_rng(seed), groups=10)
    c = fit_calibration(p, labels, names)
    assert c.thresholds == {"fake": None, "real": None}
    assert {c.verdict(x) for x in p} == {"unsure"}


@pytest.mark.parametrize(
    ("p", "labels", "part"),
    [([0.1, 0.2], [0, 0], "both classes"), ([0.9, 0.8, 0.1, 0.2], [0, 0, 1, 1], "no better than chance"),
     ([0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1], "no better than chance")],
)  # fmt: skip
def test_what_cannot_be_calibrated(p, labels, part):
    with pytest.raises(CalibrationError, match=part):
        fit_calibration(np.array(p), np.array(labels), [str(i) for i in range(len(p))])


def test_distance_is_that_of_the_nearest_neighbours(seed):
    random = np.random.default_rng(seed)
    known, new = unit_length(random.normal(size=(40, 6))), unit_length(random.normal(size=(5, 6)))
    all_distances = np.sort(np.linalg.norm(new[:, None] - known[None], axis=2), axis=1)
    assert neighbour_distance(new, known) == pytest.approx(all_distances[:, :10].mean(axis=1), abs=1e-3)


def test_far_features_are_outside(seed):
    random = np.random.default_rng(seed)
    features = unit_length(random.normal(size=(300, 8)) * 0.2 + np.eye(8)[0])
    videos = [str(i // 3) for i in range(300)]
    bound = farthest_of(features, videos, videos, 0.05)
    near = unit_length(random.normal(size=(200, 8)) * 0.2 + np.eye(8)[0])
    far = unit_length(random.normal(size=(200, 8)) * 0.2 - np.eye(8)[0])
    # single images vary more than the mean of three
    assert (neighbour_distance(near, features) > bound).mean() < 0.3
    assert (neighbour_distance(far, features) > bound).all()
    assert farthest_of(features[:30], videos[:30], videos[:30], 0.05) is None  # 10 groups


def test_file_is_read_as_written(tmp_path, seed):
    from dataclasses import replace

    random = np.random.default_rng(seed)
    p, labels, names = both(random)
    c = replace(fit_calibration(p, labels, names), features=unit_length(random.normal(size=(9, 4))), data=("d",))
    save_calibration(tmp_path, c, {"time": "now"})
    read = load_calibration(tmp_path)
    assert replace(read, features=None) == replace(c, features=None)
    assert np.abs(read.features - c.features).max() < 2e-3
    assert read.verdict(0.3) == c.verdict(0.3) and read.probability(0.3) == c.probability(0.3)
    assert load_calibration(tmp_path / "none") is None
    (file,) = tmp_path.glob("calibration-*.safetensors")
    save_calibration(tmp_path, replace(c, features=c.features[:5]), {})
    assert not file.exists() and load_calibration(tmp_path).features.shape == (5, 4)
    next(tmp_path.glob("calibration-*.safetensors")).unlink()  # the distance would go unchecked
    with pytest.raises(CalibrationError, match="damaged"):
        load_calibration(tmp_path)


def test_other_weights_have_no_calibration(tmp_path, seed):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(b"old")
    p, labels, names = both(np.random.default_rng(seed))
    save_calibration(tmp_path, fit_calibration(p, labels, names), {})
    load_calibration(tmp_path)
    (tmp_path / "adapter" / "weights").write_bytes(b"new")
    with pytest.raises(CalibrationError, match="other weights"):
        load_calibration(tmp_path)


@pytest.mark.parametrize("groups", [19, 60])
def test_the_rate_of_one_calibration_is_bounded(seed, groups):
    """Of 400 calibrations on one video a group, 95% have a rate below the limit."""
    random = np.random.default_rng(seed)
    exceeded, limit = 0, None
    for _ in range(400):
        p = random.random(groups * 2)
        labels = np.repeat([0, 1], groups)
        p[labels == 1] += 0.5
        c = fit_calibration(p / 1.6, labels, [str(i) for i in range(2 * groups)])
        limit = c.rate_limit("fake")
        inside = min(p[labels == 0], key=lambda x: abs(c.probability(x / 1.6) - c.thresholds["fake"]))
        exceeded += 1 - inside > limit  # of uniform scores, the share above a score x is 1 - x
    assert 0.05 < limit < 0.2
    assert exceeded / 400 < 0.05 + 4 * (0.05 * 0.95 / 400) ** 0.5


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"format": "masm-detect-calibration", "version": 1}', '{"format": "x", "version": 1}']
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(CalibrationError, match="masm calibrate"):
        load_calibration(tmp_path)
