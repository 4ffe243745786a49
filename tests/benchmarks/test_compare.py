"""`study.py compare`: any two variants, from the stored scores."""

import json
from functools import partial

import pytest

pytest.importorskip("masm_detect.evaluation.metrics", reason="needs the extra masm_ext[detect]")
pytest.importorskip("yaml")
from masm_detect.config import ConfigError
from tiny_study import write_results


@pytest.fixture
def results(parts, tmp_path, monkeypatch):
    """A folder with the study tiny (see `write_results`) and its report."""
    text = write_results(parts, tmp_path, 0.5)
    monkeypatch.setattr(parts["compare"], "read_study", partial(parts["plan"].read_study, folder=tmp_path))
    return tmp_path, text


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def add_copy(folder, name="other", **changes):
    """A study of the same runs under another name, its plan changed."""
    plan = json.loads((folder / "tiny.yaml").read_text()) | changes
    (folder / f"{name}.yaml").write_text(json.dumps(plan))
    (folder / name).mkdir()
    (folder / name / "units-d-1.json").write_text((folder / "tiny" / "units-d-1.json").read_text())


def copy_results(parts, folder, name="other"):
    """The results of tiny as results of the copy."""
    stored = [json.loads(file.read_text()) for file in (folder / "tiny").glob("*--seed*.json")]
    scores = {(result["variant"], result["seed"]): result for result in stored}
    for run in parts["plan"].runs_of(parts["plan"].read_study(name, folder), "final", folder):
        result = scores[run.variant, run.seed] | {"key": run.key, "settings": run.settings()}
        (folder / name / f"{run.key}.json").write_text(json.dumps(result | {"direction": run.direction}))


def test_it_is_the_row_of_the_report(parts, results):
    folder, report = results
    row = cells(parts["compare"].compare("tiny/masm", "tiny/probe", folder).splitlines()[-1])
    assert row[:2] == ["d (c)", "1, 2, 3"]
    reported = next(line for line in report.splitlines() if line.startswith("| probe | 3 |") and "[" in line)
    assert row[4:6] == cells(reported)[2:4] and row[6] == cells(reported)[5]
    turned = cells(parts["compare"].compare("tiny/probe", "tiny/masm", folder).splitlines()[-1])
    assert float(turned[4]) == -float(row[4]) < 0 and turned[2:4] == row[3:1:-1]
    seen = cells(parts["compare"].compare("tiny/masm", "tiny/probe", folder, side="seen").splitlines()[-1])
    assert seen[0] == "d (a, b)" and abs(float(seen[4])) < float(row[4])


def test_two_studies_of_the_same_images(parts, results):
    folder, _ = results
    add_copy(folder)
    copy_results(parts, folder)
    compare = parts["compare"].compare
    across = cells(compare("tiny/masm", "other/probe", folder).splitlines()[-1])
    assert across[4:] == cells(compare("tiny/masm", "tiny/probe", folder).splitlines()[-1])[4:]
    assert "Besides" not in compare("tiny/masm", "other/probe", folder)
    file = next((folder / "other").glob("d--probe--*--seed2.json"))
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"learned_sha256": "of other images"}))
    with pytest.raises(ConfigError, match="seed 2 of direction d: the two learned from other images"):
        compare("tiny/masm", "other/probe", folder)
    del result["learned_sha256"]  # an older result
    file.write_text(json.dumps(result))
    compare("tiny/masm", "other/probe", folder)
    units = folder / "other" / "units-d-1.json"
    units.write_text(units.read_text().replace('"groups": [0, 1', '"groups": [1, 0'))
    with pytest.raises(ConfigError, match="tested on other images in direction d"):
        compare("tiny/masm", "other/probe", folder)


def test_all_directions_are_one_more_row_if_they_share_seeds_and_images(parts, results):
    folder, _ = results
    direction = {"seen": ["a", "b"], "unseen": ["c"]}
    add_copy(folder, directions={"d": direction, "e": direction})
    copy_results(parts, folder)
    units = folder / "other" / "units-e-1.json"
    units.write_text((folder / "other" / "units-d-1.json").read_text())
    first, second, both = map(cells, parts["compare"].compare("other/masm", "other/probe", folder).splitlines()[-3:])
    assert first[1:] == second[1:] == both[1:] and both[0] == "all of these"
    alone = parts["compare"].compare("other/masm", "other/probe", folder, directions=["e"])
    assert cells(alone.splitlines()[-1]) == second
    units.write_text(units.read_text().replace('"groups": [0, 1', '"groups": [1, 0'))
    text = parts["compare"].compare("other/masm", "other/probe", folder)
    assert text.endswith("No row for all directions: they have no seed in common, or other test images.")


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ("masm", "tiny/probe", {}, "got 'masm': name a variant as study/variant"),
        ("tiny/mask", "tiny/probe", {}, "no variant 'mask'; it has probe, masm, wide"),
        ("large/masm", "tiny/probe", {}, "no study 'large'"),
        (
            "tiny/wide",
            "tiny/probe",
            {},
            "tiny/wide has no tested result in direction d .*name others with --directions",
        ),
        ("tiny/masm", "tiny/probe", {"directions": ["e"]}, "study tiny has no direction 'e'; it has d"),
    ],
)
def test_what_cannot_be_compared_is_named(parts, results, a, b, options, message):
    with pytest.raises(ConfigError, match=message):
        parts["compare"].compare(a, b, results[0], **options)


def test_what_else_differs_is_said(parts, results):
    folder, _ = results
    add_copy(folder, precision="bf16", optim={"epochs": 7})
    copy_results(parts, folder)
    text = parts["compare"].compare("tiny/masm", "other/probe", folder)
    assert text.splitlines()[-1] == (
        "Besides the method they differ in optim.epochs: 3 and 7; precision: 'fp32' and 'bf16'."
    )


def test_an_open_grid_and_two_results_of_a_seed_are_named(parts, results):
    folder, _ = results
    grid = {"direction": "d", "seed": 0, "settings": {"masm": [{"method.lr": 0.1}]}}
    add_copy(folder, grid=grid)
    with pytest.raises(ConfigError, match="other/masm has no tested result: its grid is not complete"):
        parts["compare"].compare("other/masm", "tiny/probe", folder)
    final = {"seeds": [1], "variants": {"probe": None}}
    again = {"seeds": [1], "variants": {"probe": {"sampling.shuffled": True}}}
    add_copy(folder, "both", stages={"final": final, "controls": again})
    study = parts["plan"].read_study("both", folder)
    (stored,) = (folder / "tiny").glob("d--probe--*--seed1.json")
    for stage in ("final", "controls"):
        (run,) = parts["plan"].runs_of(study, stage, folder)
        result = json.loads(stored.read_text()) | {"key": run.key, "settings": run.settings()}
        (folder / "both" / f"{run.key}.json").write_text(json.dumps(result))
    with pytest.raises(ConfigError, match="both/probe has two results of seed 1 in direction d"):
        parts["compare"].compare("both/probe", "tiny/probe", folder)


def test_other_forgeries_and_seeds_are_refused(parts, results):
    folder, _ = results
    for name, direction, message in (
        (
            "more",
            {"seen": ["a", "b"], "unseen": ["b", "c"]},
            "unseen forgeries of direction d: c in tiny, b, c in more",
        ),
        ("less", {"seen": ["a"], "unseen": ["c"]}, "seen forgeries of direction d: a, b in tiny, a in less"),
    ):
        add_copy(folder, name, directions={"d": direction})
        copy_results(parts, folder, name)
        with pytest.raises(ConfigError, match=message):
            parts["compare"].compare("tiny/masm", f"{name}/probe", folder)
    add_copy(folder)
    copy_results(parts, folder)
    for file in (folder / "other").glob("d--probe--*--seed[12].json"):
        file.unlink()
    for file in (folder / "tiny").glob("d--masm--*--seed3.json"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"tiny/masm has the seeds \[1, 2\], other/probe \[3\] in direction d"):
        parts["compare"].compare("tiny/masm", "other/probe", folder)
