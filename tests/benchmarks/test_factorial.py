"""The factorial: its design tells the effects apart, and its intervals hold what they say."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("masm_detect.evaluation.metrics", reason="needs the extra masm_ext[detect]")
pytest.importorskip("yaml")
from masm_detect.config import ConfigError
from masm_detect.evaluation.differences import Scored
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

    Runs with masks by agreement separate them better. Those with agreement or snr find the same photographs easy, and
    so do those with the same penalties and directions: differences of these photographs, not of all.
    """
    real, fake, own = (random.normal(size=photographs) for _ in range(3))
    cells = {cell: 0.7 * random.normal(size=photographs) for cell in sorted({row[1:3] for row, _ in chosen})}
    scores = []
    for row, seed in chosen:
        shift = 1.0 + 0.3 * (row[0] == "agreement") + 0.05 * seed + random.normal(0, 0.05)
        shared = own if row[0] in ("agreement", "snr") else np.zeros(photographs)
        noise = random.normal(0, 0.2, 2 * photographs)
        scores.append(np.r_[real, fake + shift + 1.5 * shared + cells[row[1:3]]] + noise)
    groups = np.array([str(i) for i in range(photographs)] * 2)
    return Scored(groups, np.repeat([0, 1], photographs), np.array(scores))


def rows_of(lines):
    """The cells of the table rows of a report by their first two (effects) or first one (interactions)."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    return {row[1] if len(row) == 6 else row[0]: row for row in cells}


def p_value(cell):
    return float(cell.removeprefix("< "))


def span(cell):
    return [float(end) for end in cell.strip("[]").split(",")]


def test_intervals_and_tests_hold_for_other_photographs_and_runs(parts, chosen):
    factorial = parts["factorial"]
    variants, seeds = [".".join(row) for row, _ in chosen], [seed for _, seed in chosen]
    random = np.random.default_rng(0)

    def auc(shift, shared):
        wide = 2 + 2 * 0.2**2 + 0.7**2 + (1.5**2 if shared else 0) + 0.05**2
        return np.mean([norm.cdf((shift + 0.05 * seed) / np.sqrt(wide)) for seed in (1, 2, 3)])

    expected = {
        "agreement against none": auc(1.3, True) - auc(1, False),
        "snr against none": auc(1, True) - auc(1, False),
        "random against none": 0.0,
    }
    covered, widths, interactions = dict.fromkeys(expected, 0), [], []
    for _ in range(100):
        found = rows_of(factorial.effects(variants, seeds, [scored(random, chosen)]))
        for name, value in expected.items():
            low, high = span(found[name][3])
            covered[name] += low <= value <= high
        widths.append(np.subtract(*span(found["random against none"][3])[::-1]))
        wide = span(found["random against none"][4])
        assert wide[0] <= span(found["random against none"][3])[0]
        assert (wide[0] > 0 or wide[1] < 0) <= (p_value(found["random against none"][5]) < 0.05)
        single = [float(found[f"{level} against none"][2]) for level in list(factorial.FACTORS["masks"])[1:]]
        assert abs(float(found["any mask against none"][1]) - np.mean(single)) < 0.002
        interactions.append(p_value(found["penalties and directions"][3]))
    assert all(90 <= count <= 100 for count in covered.values()), covered
    assert np.mean(widths) < 0.09  # of an AUC of .75 with 50 photographs
    assert np.mean(np.array(interactions) < 0.05) <= 0.1


def test_an_interaction_is_found(parts, chosen):
    random = np.random.default_rng(0)
    part = scored(random, chosen)
    rows = part.rows + np.array([2.0 * (row[1] == "both" and row[2] == "trailing") for row, _ in chosen])[:, None] * (
        part.labels
    )
    variants, seeds = [".".join(row) for row, _ in chosen], [seed for _, seed in chosen]
    before, after = (
        rows_of(parts["factorial"].effects(variants, seeds, [one]))["penalties and directions"]
        for one in (part, replace(part, rows=rows))
    )
    assert p_value(before[3]) > 0.1 and p_value(after[3]) < 0.01 and after[2] == "6, 10"
    assert p_value(after[4]) <= 4 * p_value(after[3]) + 0.002


def test_the_report_waits_for_all_runs(parts, chosen, tmp_path):
    study, random = parts["plan"].read_study("factorial"), np.random.default_rng(0)
    runs = list(parts["plan"].runs_of(study, "factorial", tmp_path))
    part = scored(random, [(parts["factorial"].levels_of(run.variant), run.seed) for run in runs])
    methods = ["real"] * 50 + ["blend"] * 50 + ["warp"] * 50
    units = {"datasets": ["d"] * 150, "methods": methods, "groups": list(range(50)) * 3}
    (tmp_path / "factorial").mkdir()
    (tmp_path / "factorial" / "units-no-blend-warp-1.json").write_text(json.dumps(units))
    by_key = {
        run.key: {
            "scores": [*scores, *scores[50:]],
            "direction": "no-blend-warp",
            "settings": {"sampling": {"test_tiles": 1}},
            "val_auc": 0.5 + 0.1 * ("3" in run.variant),
        }
        for run, scores in zip(runs, part.rows.tolist())
    }
    report = parts["report"]._factorial
    expected = parts["factorial"].effects([run.variant for run in runs], [run.seed for run in runs], [part, part])
    found = report(study, by_key, tmp_path)[3:]
    assert found[: len(expected)] == expected and found[-2:] == ["| K | 1 | 30 | 0.500 |", "| K | 3 | 30 | 0.600 |"]
    del by_key[runs[0].key]
    assert "59 of 60 runs are done" in report(study, by_key, tmp_path)[-1]
    assert report(study, {}, tmp_path) == []


def test_a_part_of_the_runs_is_refused(parts, chosen):
    factorial, chosen = parts["factorial"], chosen[:40]
    part = scored(np.random.default_rng(0), chosen)
    with pytest.raises(ConfigError, match="40 runs do not tell 49 effects apart"):
        factorial.effects([".".join(row) for row, _ in chosen], [seed for _, seed in chosen], [part])


def test_too_few_photographs_are_refused(parts, chosen):
    part = scored(np.random.default_rng(0), chosen, photographs=10)
    with pytest.raises(ConfigError, match="no interval of an effect: too few independent groups"):
        parts["factorial"].effects([".".join(row) for row, _ in chosen], [seed for _, seed in chosen], [part])
