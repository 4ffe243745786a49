"""The studies: runs are keyed by their settings, images keep apart, settings are chosen on validation, and intervals
hold what they say.
"""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("masm_detect.evaluation.metrics", reason="needs the extra masm_ext[detect]")
pytest.importorskip("yaml")
from masm_detect.config import ConfigError
from masm_detect.data.sample import Sample
from research_data import DATA, need
from tiny_study import tiny_study


def test_every_study_can_be_planned(parts, studies, tmp_path):
    assert studies
    for file in studies:
        study = parts["plan"].read_study(file.stem)
        grid = list(parts["plan"].runs_of(study, "grid", tmp_path))
        assert len({run.key for run in grid}) == len(grid)
        assert grid or study.settings_from or study.stages
        waiting = set()
        planned = [run for stage in study.stages for run in parts["plan"].runs_of(study, stage, tmp_path, waiting)]
        assert planned or waiting
        # the same number of settings for every variant
        assert len({len(settings) for settings in study.grid.get("settings", {}).values()}) <= 1


def test_a_key_names_its_settings(parts, tmp_path):
    plan, study = parts["plan"], tiny_study(parts, tmp_path)
    first, second = plan.runs_of(study, "grid", tmp_path)
    assert first.key.startswith("d--masm--") and first.key.endswith("--seed0") and first.key != second.key
    assert first.key == next(plan.runs_of(study, "grid", tmp_path)).key
    other = replace(study, optim=replace(study.optim, epochs=7))
    assert next(plan.runs_of(other, "grid", tmp_path)).key != first.key
    assert first.method.masm.directions == "leading" and first.method.lr == 0.1


def test_a_new_option_changes_no_key_and_other_settings_under_a_key_are_noticed(parts, tmp_path):
    plan, study = parts["plan"], tiny_study(parts, tmp_path)
    run = next(plan.runs_of(study, "grid", tmp_path))
    settings, key = run.settings(), run.key
    del settings["optim"]["uniformity"]  # as if it had been made before this option
    file = plan.result_file(run, tmp_path)
    file.parent.mkdir()
    file.write_text(json.dumps({"val_auc": 0.5, "settings": settings}))
    assert plan.stored_result(run, tmp_path)["val_auc"] == 0.5
    settings["optim"]["warmup"] = 0.2
    file.write_text(json.dumps({"val_auc": 0.5, "settings": settings}))
    with pytest.raises(ConfigError, match=r"optim\.warmup was 0\.2, is 0\.1"):
        plan.stored_result(run, tmp_path)
    before = {**plan.UNNAMED, "optim": {k: v for k, v in plan.UNNAMED["optim"].items() if k != "uniformity"}}
    older = {**run.settings(), "optim": {k: v for k, v in run.settings()["optim"].items() if k != "uniformity"}}
    assert plan._without(older, before) == plan._without(run.settings(), plan.UNNAMED)
    assert next(plan.runs_of(study, "grid", tmp_path)).key == key


def test_every_setting_has_a_value_where_it_is_not_named(parts, tmp_path):
    """A new setting needs a line in unnamed_settings.json: without it every key would change."""
    run = next(parts["plan"].runs_of(tiny_study(parts, tmp_path), "grid", tmp_path))
    for part, unnamed in parts["plan"].UNNAMED.items():
        settings = run.settings()[part]
        if not isinstance(unnamed, dict):
            continue
        assert set(settings) == set(unnamed), part
        for name, value in settings.items():
            if isinstance(value, dict):
                assert set(value) == set(unnamed[name]), name


#: Settings that were tried and left out of the grid.
GIVEN_UP = {("lora", 0.002), ("masm-leading", 0.02), ("full", 0.0001)}


def test_every_committed_result_is_of_a_run_that_the_study_plans(parts, request):
    """A changed default of the program must not make results unfindable, or pass one off as another."""
    plan = parts["plan"]
    folder = request.config.rootpath / "benchmarks" / "generalization" / "results"
    for name in sorted({file.parent.name for file in folder.glob("*/*--seed*.json")}):
        study = plan.read_study(name)
        runs = [run for stage in plan.STAGES for run in plan.runs_of(study, stage, folder, set())]
        planned = {run.key: run for run in runs}
        for file in (folder / name).glob("*--seed*.json"):
            result = json.loads(file.read_text())
            if (result["variant"], (result["settings"]["method"] or {}).get("lr")) in GIVEN_UP:
                continue
            assert file.stem == result["key"] and result["key"] in planned, result["key"]
            assert plan.stored_result(planned[result["key"]], folder) == result


def test_the_best_validation_chooses_and_an_open_grid_chooses_nothing(parts, tmp_path):
    plan, study = parts["plan"], tiny_study(parts, tmp_path)
    for run, auc in zip(plan.runs_of(study, "grid", tmp_path), (0.6, 0.7)):
        with pytest.raises(ConfigError, match="grid of masm in study tiny is not complete"):
            list(plan.runs_of(study, "final", tmp_path))
        waiting = set()
        assert {run.variant for run in plan.runs_of(study, "final", tmp_path, waiting)} == {"probe"}
        assert waiting == {"masm", "wide"}
        file = plan.result_file(run, tmp_path)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"val_auc": auc, "settings": run.settings()}))
    runs = list(plan.runs_of(study, "final", tmp_path))
    assert [(run.variant, run.seed) for run in runs] == [
        *(("masm", 1), ("wide", 1), ("probe", 1), ("masm", 2), ("probe", 2)),
    ]
    assert [run.method.lr for run in runs[:2]] == [0.2, 0.2]  # "wide" is like masm, with what was chosen for it
    assert runs[1].method.masm.subspace_rank == 8
    own = replace(study, variants=study.variants | {"slow": {"like": "masm", "method.lr": 0.05}})
    assert plan.make_run(own, "d", "slow", 1, {}, chosen=tmp_path).method.lr == 0.05  # its own setting holds
    run = next(plan.runs_of(study, "grid", tmp_path))
    assert plan.stored_result(run, tmp_path) and plan.stored_result(run, tmp_path, tested=True) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "imagenet"}, "no data set 'imagenet'"),
        ({"surprise": 1}, "surprise"),
        ({"variants": {"masm": {"optimiser.lr": 1}}, "stages": {}}, "unknown setting 'optimiser.lr'"),
        ({"variants": {"masm": {"method.rate": 1}}, "stages": {}}, "study tiny, masm: .*rate"),
        (
            {"stages": {"finals": {"seeds": [1], "variants": {"masm": None}}}},
            "no stage 'finals'; there are grid, final",
        ),
        ({"stages": {"final": {"seed": [1]}}}, r"stage 'final' needs seeds and variants, got \{'seed': \[1\]\}"),
        ({"stages": {"final": {"seeds": [1], "variants": {"masm": {"seeds": [4]}}}}}, "no seed of the stage 'final' 4"),
        ({"directions": {"d": {"seen": ["a"], "unsen": ["c"]}}}, "unsen"),
        ({"stages": {"final": {"seeds": [1], "variants": {"mask": None}}}}, "no variant 'mask'; there are probe, masm"),
        ({"grid": {"direction": "d", "seed": 0, "setings": {}}}, "no part of a grid 'setings'"),
        ({"grid": {"direction": "e", "seed": 0, "settings": {}}}, "no direction 'e'"),
        ({"reference": "mask"}, "no variant 'mask'"),
        ({"settings_from": "ffhq-gan"}, "ffhq-gan has variants masm, probe too: rename them"),
        (
            {
                "variants": {"masm": {"method.lr": "1e-3"}},
                "stages": {},
                "grid": {"direction": "d", "seed": 0, "settings": {"masm": [{}]}},
            },
            "study tiny, masm: .*'1e-3'",
        ),
    ],
)
def test_a_mistake_in_a_study_is_named(parts, tmp_path, changes, message):
    source = parts["plan"].HERE / "studies" / "ffhq-gan.yaml"
    (tmp_path / "ffhq-gan.yaml").write_bytes(source.read_bytes())
    with pytest.raises(ConfigError, match=message):
        list(parts["plan"].runs_of(tiny_study(parts, tmp_path, **changes), "grid", tmp_path))


def test_a_variant_like_one_that_is_like_another_is_refused(parts, tmp_path):
    study = tiny_study(parts, tmp_path)
    study = replace(study, variants=study.variants | {"wider": {"like": "wide", "masm.subspace_rank": 16}})
    with pytest.raises(ConfigError, match="wider is like wide, which is like another itself"):
        parts["plan"].make_run(study, "d", "wider", 1, {})


def tiles(shared):
    """20 pool and 5 test photographs; each has 3 tiles, real and of two forgeries, in one group if `shared`."""
    for method in ("real", "a", "b", "c"):
        for photo in range(25):
            for tile in range(3):
                group = str(photo) if shared else f"{method}-{photo}"
                split = "pool" if photo < 20 else "test"
                path = f"{method}/{photo}-{tile}"
                yield Sample(path, int(method != "real"), "d", method, f"d/{method}/{photo}", split, group)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_photograph_is_on_two_sides_and_classes_are_balanced(parts, tmp_path, shared, seed):
    run = next(parts["plan"].runs_of(tiny_study(parts, tmp_path), "grid", tmp_path))
    drawn = parts["runner"].draw(parts["study_data"].Images(list(tiles(shared)), {}), replace(run, seed=seed))
    sides = [{s.group for s in part} for part in (drawn.train, drawn.val, drawn.test)]
    assert not sides[0] & sides[1] and not (sides[0] | sides[1]) & sides[2]
    assert {s.method for s in drawn.train} == {s.method for s in drawn.val} == {"real", "a", "b"}
    assert {s.method for s in drawn.test} == {"real", "a", "b", "c"}
    for part, photos in ((drawn.train, 6), (drawn.val, 3)):
        real = [s for s in part if s.label == 0]
        assert len(real) == 2 * photos == len(part) - len(real)
    assert len(drawn.test) == 5 * 4  # one tile of each test image
    other = parts["runner"].draw(parts["study_data"].Images(list(tiles(shared)), {}), replace(run, seed=seed + 7))
    assert drawn.test == other.test and drawn.train != other.train


def test_a_forgery_without_images_is_named(parts, tmp_path):
    study = tiny_study(parts, tmp_path)
    run = parts["plan"].make_run(study, "d", "probe", 1, {})
    images = parts["study_data"].Images(list(tiles(True)), {})
    parts["runner"].draw(images, run)
    for changes, message in (({"seen": ("a", "bb")}, "of bb to train on"), ({"unseen": ("cc",)}, "of cc to test")):
        with pytest.raises(ConfigError, match=f"has no images {message}"):
            parts["runner"].draw(images, replace(run, **changes))


def test_a_hash_names_what_was_learned_from(parts, tmp_path):
    run = parts["plan"].make_run(tiny_study(parts, tmp_path), "d", "probe", 1, {})
    samples = list(tiles(True))
    pixels = {sample.path: np.full((2, 2, 3), i % 250, np.uint8) for i, sample in enumerate(samples)}
    images = parts["study_data"].Images(samples, pixels)
    drawn = parts["runner"].draw(images, run)
    first = drawn.learned_sha256(images)
    assert first == parts["runner"].draw(images, replace(run, variant="masm")).learned_sha256(images)
    relabelled = replace(drawn, train=[replace(drawn.train[0], label=1 - drawn.train[0].label), *drawn.train[1:]])
    assert relabelled.learned_sha256(images) != first
    pixels[drawn.test[0].path] += 1
    assert drawn.learned_sha256(images) == first
    pixels[drawn.val[0].path] += 1
    assert drawn.learned_sha256(images) != first


def test_runs_that_did_not_start_in_time_are_an_exit_code(request, tmp_path):
    program = request.config.rootpath / "benchmarks" / "generalization" / "study.py"
    command = [sys.executable, str(program), "run", "sources", "--data", "x", "--results", str(tmp_path), "--minutes=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3 and "stopped after 0 minutes with 1 runs to go" in done.stderr, done.stderr


def test_absent_data_and_an_unknown_study_are_named(request, tmp_path):
    program = request.config.rootpath / "benchmarks" / "generalization" / "study.py"
    command = [sys.executable, str(program), "run", "nothing", "--data", str(tmp_path), "--results", str(tmp_path)]
    unknown = subprocess.run(command, capture_output=True, text=True)
    assert unknown.returncode == 2 and "there is no study 'nothing'" in unknown.stderr
    command[3:4] = ["sources", "--stages", "controls", "--only", "spectrum"]
    absent = subprocess.run(command, capture_output=True, text=True)
    assert absent.returncode == 2 and f"study.py: {tmp_path}/ffhq-gan/real is absent" in absent.stderr, absent.stderr


def test_a_stored_run_can_be_repeated(request, tmp_path):
    need("ffhq-gan", "unsplash-men", "lfw-politicians")
    folder = request.config.rootpath / "benchmarks" / "generalization"
    (stored,) = (folder / "results" / "sources").glob("unsplash--spectrum--*--seed1.json")
    command = [sys.executable, str(folder / "study.py"), "run", "sources", "--data", str(DATA)]
    command += ["--stages", "controls", "--only", "spectrum", "--repeat", str(tmp_path), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "  stored: val 0.000, lfw " in done.stderr + done.stdout
    (again,) = (tmp_path / "sources").glob("unsplash--spectrum--*--seed1.json")
    results = [json.loads(file.read_text()) for file in (stored, again)]
    assert results[1]["auc"] == pytest.approx(results[0]["auc"], abs=1e-3)
    assert "0 of them missing" in subprocess.run(command, capture_output=True, text=True).stdout


def test_shuffled_labels_reach_every_method(parts, tmp_path):
    run = next(parts["plan"].runs_of(tiny_study(parts, tmp_path), "grid", tmp_path))
    data = parts["study_data"].Images(list(tiles(True)), {})
    shuffled = replace(run, sampling=replace(run.sampling, shuffled=True))
    before, after = (parts["runner"].draw(data, one).train for one in (run, shuffled))
    assert [s.path for s in before] == [s.path for s in after]
    assert sum(s.label for s in before) == sum(s.label for s in after)
    assert any(a.label != b.label for a, b in zip(before, after))


def test_groups_that_are_shared_in_part_may_not_cross(parts, tmp_path):
    run = next(parts["plan"].runs_of(tiny_study(parts, tmp_path), "grid", tmp_path))
    # forgery a lacks the last photograph, so its groups are drawn in another order than the real ones
    part = [s for s in tiles(True) if not (s.method == "a" and s.group == "19")]
    with pytest.raises(ConfigError, match="groups are in training and validation both"):
        for seed in range(5):
            parts["runner"].draw(parts["study_data"].Images(part, {}), replace(run, seed=seed))
