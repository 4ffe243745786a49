"""Reports of studies: differences and their intervals, over one direction and over all, and what stands beside them."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("masm_detect.evaluation.metrics", reason="needs the extra masm_ext[detect]")
pytest.importorskip("yaml")
from masm_detect.config import ConfigError
from tiny_study import tiny_study, write_results


def scored(rng, shift_a, shift_b, groups, seeds, spread):
    """Scores of two detectors on real units and fakes, a group each; they see the same noise of an image."""
    image = rng.normal(size=2 * groups)
    fake = np.repeat([0, 1], groups)
    out = []
    for shift in (shift_a, shift_b):
        moved = shift + spread * rng.normal(size=seeds)  # training noise
        out.append([image + 0.5 * rng.normal(size=2 * groups) + move * fake for move in moved])
    return ["d"] * 2 * groups, np.where(fake, "f", "real").tolist(), list(range(2 * groups)), *out


def difference_of(parts):
    """The difference of two detectors from units and their scores."""

    def difference(datasets, methods, groups, a, b, forgeries):
        units = {"datasets": datasets, "methods": methods, "groups": groups}
        return parts["differences"].difference(parts["differences"].parts_of(units, a, b, forgeries))

    return difference


@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_the_interval_of_a_difference_covers_it(parts, spread):
    rng = np.random.default_rng(0)
    difference = difference_of(parts)
    exact = np.mean([difference(*scored(rng, 1.0, 0.8, 4000, 2, 0.0), ["f"]).mean for _ in range(3)])
    inside = []
    for _ in range(80):
        low, high = difference(*scored(rng, 1.0, 0.8, 50, 4, spread), ["f"]).interval()
        inside.append(low < exact < high)
    assert np.mean(inside) > 0.9


def test_the_interval_is_paired(parts):
    """The control: shuffled images of one detector lose the pairing, and widen the interval."""
    rng = np.random.default_rng(1)
    datasets, methods, groups, a, b = scored(rng, 1.0, 0.9, 200, 3, 0.0)
    paired = difference_of(parts)(datasets, methods, groups, a, b, ["f"])
    order = np.r_[rng.permutation(200), 200 + rng.permutation(200)]
    mixed = difference_of(parts)(datasets, methods, groups, a, [scores[order] for scores in b], ["f"])
    assert mixed.mean == pytest.approx(paired.mean) and mixed.error > 1.5 * paired.error


def test_one_seed_has_no_interval(parts):
    value = difference_of(parts)(*scored(np.random.default_rng(0), 1, 1, 40, 1, 0.0), ["f"])
    assert value.interval() is None and value.p_value() is None and len(value.per_seed) == 1


def corrected(text):
    line = next(line for line in text.splitlines() if line.startswith("| probe | 3 |") and "[" in line)
    return [float(part) for part in line.split("|")[5].strip(" []").split(",")]


def test_the_report_finds_a_real_difference_and_no_other(parts, tmp_path):
    (tmp_path / "with").mkdir(), (tmp_path / "without").mkdir()
    text = write_results(parts, tmp_path / "with", 0.5)
    assert corrected(text)[0] > 0 and (tmp_path / "with" / "tiny-d.png").is_file()
    low, high = corrected(write_results(parts, tmp_path / "without", 0.0))
    assert low < 0 < high


def test_runs_of_a_seed_that_learned_from_other_images_are_refused(parts, tmp_path):
    assert "6 runs. Processors: a CPU (6 runs); torch: 2 (6 runs)" in write_results(parts, tmp_path, 0.5)
    results = [json.loads(file.read_text()) for file in sorted((tmp_path / "tiny").glob("*--seed*.json"))]
    results[-1]["learned_sha256"] = "of other images"
    with pytest.raises(ConfigError, match=r"--masm--.*seed3 and .*--probe--.*seed3 learned from other images"):
        parts["report"].study_report(parts["plan"].read_study("tiny", tmp_path), results, tmp_path)
    del results[-1]["learned_sha256"]  # an older result
    parts["report"].study_report(parts["plan"].read_study("tiny", tmp_path), results, tmp_path)


def test_a_report_without_its_reference_says_so(parts, tmp_path):
    text = write_results(parts, tmp_path, 0.5)
    assert "masm minus each other variant" in text
    for file in (tmp_path / "tiny").glob("d--masm--*"):
        file.unlink()
    results = [json.loads(file.read_text()) for file in sorted((tmp_path / "tiny").glob("*--seed*.json"))]
    study = parts["plan"].read_study("tiny", tmp_path)
    assert "masm, with which the others are compared, has no results yet" in parts["report"].study_report(
        study, results, tmp_path
    )


def test_all_directions_are_averaged(parts, tmp_path):
    text = write_results(parts, tmp_path, 0.5)
    assert "## Final: all directions" not in text
    results = [json.loads(file.read_text()) for file in sorted((tmp_path / "tiny").glob("*--seed*.json"))]
    table = {}
    for result in results:
        table.setdefault(result["variant"], {})[result["seed"]] = result
    study = parts["plan"].read_study("tiny", tmp_path)
    study = replace(study, directions=study.directions | {"e": study.directions["d"]})
    swapped = {**table, "masm": table["probe"], "probe": table["masm"]}  # in the other direction probe is better
    overall, units = parts["report"]._overall, (tmp_path / "tiny" / "units-d-1.json").read_text()
    (tmp_path / "tiny" / "units-e-1.json").write_text(units)
    tables = {"d": table, "e": {n: {s: r | {"direction": "e"} for s, r in t.items()} for n, t in table.items()}}
    alike = next(line for line in overall(study, tables, tmp_path) if line.startswith("| probe | 3 |"))
    one = next(line for line in text.splitlines() if line.startswith("| probe | 3 |") and "[" in line)
    assert alike.split("|")[4:] == one.split("|")[3:]  # twice the same direction is that direction
    tables["e"] = {n: {s: r | {"direction": "e"} for s, r in t.items()} for n, t in swapped.items()}
    against = next(line for line in overall(study, tables, tmp_path) if line.startswith("| probe | 3 |"))
    assert float(against.split("|")[4]) == pytest.approx(0, abs=1e-3)
    assert overall(study, {"d": table}, tmp_path) == []
    (tmp_path / "tiny" / "units-e-1.json").write_text(units.replace('"groups": [0, 1', '"groups": [1, 0'))
    assert overall(study, tables, tmp_path) == []  # other units


def test_the_cost_of_a_step_is_measured_and_stands_beside_the_score(parts, tmp_path):
    pytest.importorskip("transformers")
    study = replace(tiny_study(parts, tmp_path), backbone="bundled:dinov2-small", image_size=28)
    probe, masm = (parts["cost"].measure(parts["plan"].make_run(study, "d", name, 0, {})) for name in ("probe", "masm"))
    assert probe["seconds"] > 0 and masm["seconds"] > 0 and probe["trained"] == 385 < masm["trained"]
    if probe["counter"] == "VmHWM of the steps":  # the peak of building a method, or of this process before, hides none
        assert min(probe["bytes"], masm["bytes"]) > 0 and max(probe["bytes"], masm["bytes"]) < 200 * 2**20
    (tmp_path / "tiny").mkdir()
    table = {"masm": {"time_ratio": 1.234, "mebibytes": 56}}
    (tmp_path / "tiny" / "cost.json").write_text(json.dumps({"variants": table}))
    text = write_results(parts, tmp_path, 0.5)
    lines = [line for line in text.splitlines() if line.startswith(("| masm | 3 |", "| probe | 3 |"))]
    assert lines[0].endswith("| 1.23 | 56 |") and lines[1].endswith("| - | - |"), text
