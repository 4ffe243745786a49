"""Differences of AUC: equal detectors are not told apart, different ones are; seeds; Holm."""

from __future__ import annotations

import numpy as np
import pytest
from equal_detectors import draw_scores, part_of
from masm_detect.evaluation.delong import aucs
from masm_detect.evaluation.differences import VARIANCES, Difference, Part, Source, difference, holm, holm_p_values
from scipy.stats import ttest_1samp
from sklearn.metrics import roc_auc_score

RUNS = 200


def assert_rate(claims, level=0.05):
    """At most `level` of the claims are false, up to four standard errors of their number: one test run in 30,000."""
    rate = np.mean(claims)
    assert rate <= level + 4 * np.sqrt(level * (1 - level) / len(claims)), rate


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_mean_and_its_error(variance, seed):
    rng = np.random.default_rng(seed)
    groups, labels, scores = draw_scores(rng, groups=150)
    found = difference([part_of(groups, labels, scores)], variance=variance, seed=seed)
    expected = roc_auc_score(labels, scores[0, 0]) - roc_auc_score(labels, scores[1, 0])
    assert found.mean == pytest.approx(expected) and found.sources[0].freedom == pytest.approx(149)
    values = []
    for _ in range(200):
        _, labels, scores = draw_scores(rng, groups=150)
        values.append(-np.diff(aucs(labels, scores[:, 0])))
    assert found.error == pytest.approx(np.std(values), rel=0.35)


def test_the_three_errors_agree(seed):
    """With many groups they estimate the same number; of two data sets that share groups, too."""
    rng = np.random.default_rng(seed)
    groups, labels, scores = draw_scores(rng, groups=200)
    half = np.arange(len(labels)) % 2 == 0
    parts = [Part(groups[keep], labels[keep], scores[0][:, keep], scores[1][:, keep]) for keep in (half, ~half)]
    for many in (parts, parts[:1]):
        jackknife, delong, bootstrap = (difference(many, variance=name, seed=seed).error for name in VARIANCES)
        assert delong == pytest.approx(jackknife, rel=0.05) and bootstrap == pytest.approx(jackknife, rel=0.12)
    apart = [part_of(*draw_scores(rng, groups=200)) for _ in range(2)]
    renamed = [Part(np.char.add(part.groups, f"-{i}"), part.labels, part.a, part.b) for i, part in enumerate(apart)]
    errors = [difference([part]).error for part in renamed]
    for name in VARIANCES:  # independent data sets: the variances add up
        expected = np.hypot(*errors) / 2
        assert difference(renamed, variance=name, seed=seed).error == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("both", [True, False], ids=["both classes in a group", "one class a group"])
@pytest.mark.parametrize("auc", [0.65, 0.9])
def test_equal_detectors_are_not_told_apart(auc, both, seed):
    """20 groups a class, the fewest for which there is an interval."""
    rng = np.random.default_rng(seed)
    draws = [part_of(*draw_scores(rng, auc=auc, both=both)) for _ in range(RUNS)]
    assert_rate([difference([part]).p_value() < 0.05 for part in draws])


def test_few_reals_beside_many_fakes(seed):
    """The degrees of freedom are those of the few: 20 groups of reals, not 220 of both."""
    rng = np.random.default_rng(seed)
    claims, freedoms = [], []
    for _ in range(RUNS):
        groups, labels, scores = draw_scores(rng, groups=120, both=False, frames=2)
        keep = (labels == 1) | np.isin(groups, np.unique(groups[labels == 0])[:20])
        found = difference([part_of(groups[keep], labels[keep], scores[..., keep])])
        claims.append(found.p_value() < 0.05)
        freedoms.append(found.sources[0].freedom)
    assert_rate(claims)
    assert min(freedoms) > 18.9 and np.median(freedoms) < 60


def test_frames_taken_as_independent_are_told_apart(seed):
    """The control: without the groups, equal detectors are reported as different far more often."""
    rng = np.random.default_rng(seed)
    claims = []
    for _ in range(RUNS):
        groups, labels, scores = draw_scores(rng, frames=10, both=False)
        loose = np.arange(len(groups)).astype(str)
        claims.append(difference([part_of(loose, labels, scores)]).p_value() < 0.05)
    assert np.mean(claims) > 0.2


def test_of_several_comparisons_no_claim_is_made_in_95_of_100_cases(seed):
    """Four equal detectors, all six pairs: Holm keeps the rate of studies with any claim."""
    rng = np.random.default_rng(seed)
    with_holm, without = [], []
    for _ in range(RUNS):
        groups, labels, scores = draw_scores(rng, detectors=4, frames=2)
        p = {
            f"{a} {b}": difference([part_of(groups, labels, scores, a, b)]).p_value()
            for a in range(4)
            for b in range(a)
        }
        with_holm.append(min(holm_p_values(p).values()) < 0.05)
        without.append(min(p.values()) < 0.05)
    assert_rate(with_holm)
    assert np.mean(without) > 0.08


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("seeds", [2, 5])
def test_seeds_of_equal_methods_are_not_told_apart(seeds, paired, seed):
    """The training moves each run by about .08 of AUC, more than the choice of test videos does."""
    rng = np.random.default_rng(seed)
    draws = [part_of(*draw_scores(rng, seeds=seeds, frames=2, drift=0.4)) for _ in range(RUNS)]
    assert_rate([difference([part], paired=paired).p_value() < 0.05 for part in draws])
    first = [Part(part.groups, part.labels, part.a[:1], part.b[:1]) for part in draws]
    # The control: the runs themselves do differ, and one run of each cannot tell a method from its luck.
    assert np.mean([difference([part]).p_value() < 0.05 for part in first]) > 0.08


@pytest.mark.parametrize("variance", VARIANCES)
def test_a_better_detector_is_found(variance, seed):
    groups, labels, scores = draw_scores(np.random.default_rng(seed), groups=60, seeds=5, frames=2)
    better = Part(groups, labels, scores[0] + 1.5 * labels, scores[1])
    found = difference([better], variance=variance)
    assert found.p_value() < 0.01 and found.interval()[0] > 0 and len(found.per_seed) == 5
    other = difference([Part(groups, labels, better.b, better.a)], variance=variance)
    assert other.mean == pytest.approx(-found.mean) and other.interval()[1] < 0


def test_too_few_groups_make_no_claim(seed):
    groups, labels, scores = draw_scores(np.random.default_rng(seed), groups=19)
    found = difference([Part(groups, labels, scores[0] + 9 * labels, scores[1])])
    assert found.p_value() is None and found.interval() is None
    assert found.reason == "too few independent groups (19) to compare"
    groups, labels, scores = draw_scores(np.random.default_rng(seed), groups=100)
    groups[: len(groups) * 2 // 5] = "one"
    assert difference([part_of(groups, labels, scores)]).reason.startswith("one group holds 40% of the real samples")


def test_the_same_scores_are_equal(seed):
    groups, labels, scores = draw_scores(np.random.default_rng(seed))
    for variance in VARIANCES:
        found = difference([part_of(groups, labels, scores, 0, 0)], variance=variance)
        assert (found.mean, found.p_value(), found.interval()) == (0, 1, (0, 0))


def test_p_is_where_the_interval_ends_at_zero(seed):
    """With one source it is Student's t; with several the half-widths of each add up in squares."""
    rng = np.random.default_rng(seed)
    for count in (1, 2, 3):
        sources = tuple(
            Source(v, f) for v, f in zip(rng.uniform(1e-5, 1e-3, count), rng.integers(1, 40, count).tolist())
        )
        error = np.sqrt(sum(s.variance for s in sources))
        # at most 4 standard errors: of a level 1 - p nothing is left where p is as small as a rounding error
        found = Difference((0.7 + error * rng.uniform(0.01, 4),), (0.7,), sources)
        assert found.interval(1 - found.p_value())[0] == pytest.approx(0, abs=1e-9)
        one = [found.mean - Difference(found.auc_a, found.auc_b, (s,)).interval()[0] for s in sources]
        assert found.mean - found.interval()[0] == pytest.approx(np.linalg.norm(one))
    plain = Difference((0.8, 0.7, 0.9), (0.7, 0.7, 0.7), (Source(np.var([0.1, 0, 0.2], ddof=1) / 3, 2),))
    assert plain.p_value() == pytest.approx(ttest_1samp([0.1, 0, 0.2], 0).pvalue)


def test_small_p_values_are_exact():
    """Three sources are solved for, one is not; of a source without variance nothing may come."""
    one = Difference((0.8,), (0.7,), (Source(1e-5, 30),))
    three = Difference((0.8,), (0.7,), (Source(0.0, 1), Source(1e-5, 30), Source(0.0, 5)))
    assert 1e-28 < one.p_value() < 1e-22
    assert three.p_value() == pytest.approx(one.p_value(), rel=1e-6)


@pytest.mark.parametrize("freedom", [1, 2, 4])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_two_sources_of_error_hold_the_rate(freedom, share, seed):
    """Normal differences with known sources: `share` of the variance is of the seeds. Welch and Satterthwaite fails."""
    rng = np.random.default_rng(seed)
    draws = 2000
    groups, seeds = (1 - share) * rng.chisquare(38, draws) / 38, share * rng.chisquare(freedom, draws) / freedom
    claims = [
        abs(mean) > Difference((0.0,), (0.0,), (Source(g, 38), Source(s, freedom))).interval()[1]
        for mean, g, s in zip(rng.normal(size=draws), groups, seeds)
    ]
    assert_rate(claims)


def test_holm_steps_down_until_the_first_failure():
    levels = holm({"a": 0.001, "b": 0.02, "c": 0.04, "d": 0.6, "e": None})
    assert levels["a"] == pytest.approx(1 - 0.05 / 4) and levels["b"] == pytest.approx(1 - 0.05 / 3)
    assert levels["c"] == levels["d"] == levels["b"] and "e" not in levels


def test_adjusted_p_values_as_of_statsmodels(seed):
    # statsmodels.stats.multitest.multipletests([.001, .011, .02, .04, .6, .013], method="holm"), statsmodels 0.15
    p = dict(zip("abcdef", [0.001, 0.011, 0.02, 0.04, 0.6, 0.013]))
    expected = dict(zip("abcdef", STATSMODELS))
    assert holm_p_values(p | {"unknown": None}) == pytest.approx(expected)
    drawn = {str(i): float(value) for i, value in enumerate(np.random.default_rng(seed).random(20) ** 3)}
    adjusted, levels = holm_p_values(drawn), holm(drawn)
    assert {n for n in drawn if adjusted[n] <= 0.05} == {n for n in drawn if drawn[n] <= 1 - levels[n] + 1e-12}


STATSMODELS = [0.006, 0.055, 0.06, 0.08, 0.6, 0.055]
