"""The factorial: its design tells the effects apart, and its intervals hold what they say."""

import re

import numpy as np
import pytest

pytest.importorskip("masm_detect.evaluation.metrics", reason="needs the extra masm_ext[detect]")
pytest.importorskip("yaml")
from masm_detect.config import ConfigError
from masm_detect.evaluation.differences import Part
from scipy.stats import norm


@pytest.fixture(scope="module")
def chosen(parts):
    return parts["factorial"].choose()


def test_the_design_is_balanced_and_written(parts, chosen, studies):
    factorial = parts["factorial"]
    rows, seeds = [row for row, _ in chosen], [seed for _, seed in chosen]
    x, names = factorial.design_matrix(rows, seeds)
    assert len(set(chosen)) == 60 and np.linalg.matrix_rank(x) == len(names) == 50
    for place, levels in enumerate(factorial.FACTORS.values()):
        counts = [sum(row[place] == level for row in rows) for level in levels]
        assert max(counts) <= 1.5 * min(counts)
    study = parts["plan"].read_study("factorial")
    runs = list(parts["plan"].runs_of(study, "factorial", studies[0].parent))
    assert sorted((tuple(run.variant.split(".")), run.seed) for run in runs) == sorted(chosen)
    ranks = {np.sum(np.ravel(run.method.masm.subspace_rank)) * (1 if run.method.masm.num_subspaces == 1 else 3)
             for run in runs}  # fmt: skip
    assert ranks == {9}


def scored(random, chosen, photographs=50):
    """Scores of all runs on a new draw of photographs, each real and forged.

    Runs with masks by agreement separate them better, and all of them find the same photographs easy; those with snr
    find others easy, at the same mean.
    """
    real, fake, own = (random.normal(size=photographs) for _ in range(3))
    scores = []
    for row, seed in chosen:
        shift = 1.0 + 0.3 * (row[0] == "agreement") + 0.05 * seed + random.normal(0, 0.05)
        shared = own if row[0] in ("agreement", "snr") else np.zeros(photographs)
        scores.append(np.r_[real, fake + shift + 1.5 * shared] + random.normal(0, 0.2, 2 * photographs))
    groups = np.array([str(i) for i in range(photographs)] * 2)
    return Part(groups, np.repeat([0, 1], photographs), np.array(scores), np.empty((0, 2 * photographs)))


def test_intervals_of_effects_hold_for_other_photographs_and_runs(parts, chosen):
    factorial = parts["factorial"]
    variants, seeds = [".".join(row) for row, _ in chosen], [seed for _, seed in chosen]
    random = np.random.default_rng(0)

    def auc(shift, shared):
        wide = 2 + 2 * 0.2**2 + (1.5**2 if shared else 0) + 0.05**2
        return np.mean([norm.cdf((shift + 0.05 * seed) / np.sqrt(wide)) for seed in (1, 2, 3)])

    expected = {
        "agreement against none": auc(1.3, True) - auc(1, False),
        "snr against none": auc(1, True) - auc(1, False),
        "random against none": 0.0,
    }
    covered = dict.fromkeys(expected, 0)
    for _ in range(100):
        lines = factorial.effects(variants, seeds, [scored(random, chosen)])
        for name, value in expected.items():
            line = next(line for line in lines if f"| {name} |" in line)
            low, high = map(float, re.search(r"\[([-+.\d]+), ([-+.\d]+)\]", line).groups())
            covered[name] += low <= value <= high
    assert all(90 <= count <= 100 for count in covered.values()), covered


def test_an_interaction_is_found_and_noise_is_not(parts, chosen):
    factorial = parts["factorial"]
    x, names = factorial.design_matrix([row for row, _ in chosen], [seed for _, seed in chosen])
    random = np.random.default_rng(0)
    tested = [all(f"{factor}=" in name for factor in ("penalties", "directions")) for name in names]
    found = []
    for size in (0.0, 0.2):
        changed = np.array([row[1] == "both" and row[2] == "trailing" for row, _ in chosen])
        ratios = [factorial._f_ratio(x, size * changed + random.normal(0, 0.02, 60), tested) for _ in range(50)]
        assert {more for _, more in ratios} == {6}
        found.append(np.median([ratio for ratio, _ in ratios]))
    assert 0.5 < found[0] < 1.6 and found[1] > 5


def test_a_part_of_the_runs_is_refused(parts, chosen):
    factorial, chosen = parts["factorial"], chosen[:40]
    part = scored(np.random.default_rng(0), chosen)
    with pytest.raises(ConfigError, match="40 runs do not tell 49 effects apart"):
        factorial.effects([".".join(row) for row, _ in chosen], [seed for _, seed in chosen], [part])
