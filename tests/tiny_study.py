"""A small study, and results of it, for the tests of benchmarks/generalization."""

import json

import numpy as np


def tiny_study(parts, folder, **changes):
    text = {
        "title": "a study", "caution": "none", "dataset": "families", "backbone": "bundled:dinov2-small",
        "image_size": 112, "sampling": {"train": 6, "val": 3, "train_tiles": 2}, "reference": "masm",
        "directions": {"d": {"seen": ["a", "b"], "unseen": ["c"]}},
        "variants": {
            "probe": {"method.name": "probe"},
            "masm": {"method.name": "masm-nomask", "masm.directions": "leading"},
            "wide": {"like": "masm", "masm.subspace_rank": 8},
        },
        "grid": {"direction": "d", "seed": 0, "settings": {"masm": [{"method.lr": 0.1}, {"method.lr": 0.2}]}},
        "stages": {"final": {"seeds": [1, 2], "variants": {"masm": None, "wide": {"seeds": [1]}, "probe": None}}},
    } | changes  # fmt: skip
    (folder / "tiny.yaml").write_text(json.dumps(text))  # JSON is YAML
    return parts["plan"].read_study("tiny", folder)


def write_results(parts, tmp_path, gain):
    """Results of masm and probe on seeds 1 to 3; masm is better by `gain` on the unseen forgery."""
    stages = {"final": {"seeds": [1, 2, 3], "variants": {"masm": None, "probe": None}}}
    study = tiny_study(parts, tmp_path, stages=stages, grid={"direction": "d", "seed": 0, "settings": {}})
    runs = {(run.variant, run.seed): run for run in parts["plan"].runs_of(study, "final", tmp_path)}
    rng = np.random.default_rng(0)
    methods = [name for name in ("real", "a", "b", "c") for _ in range(60)]
    units = {"names_sha256": "0", "datasets": ["d"] * 240, "methods": methods, "groups": list(range(60)) * 4}
    image = rng.normal(size=240)
    (tmp_path / "tiny").mkdir(exist_ok=True)
    for variant in ("masm", "probe"):
        for seed in (1, 2, 3):
            fake, new = np.array(methods) != "real", np.array(methods) == "c"
            scores = image + 0.2 * rng.normal(size=240) + fake + gain * (variant == "masm") * new
            auc = {
                name: float(np.mean([s > r for s in scores[np.array(methods) == name] for r in scores[:60]]))
                for name in ("a", "b", "c")
            }
            record = {
                "key": runs[variant, seed].key, "stage": "final", "direction": "d", "variant": variant,
                "seed": seed, "scores": scores.round(5).tolist(), "auc": auc, "seconds": 1.0,
                "settings": runs[variant, seed].settings(), "trainable_parameters": 385,
                "provenance": {"packages": {"torch": "2"}, "device": {"name": "a CPU"}, "git": None},
                "learned_sha256": f"of seed {seed}",
            }  # fmt: skip
            (tmp_path / "tiny" / f"{record['key']}.json").write_text(json.dumps(record))
    (tmp_path / "tiny" / "units-d-1.json").write_text(json.dumps(units))
    results = [json.loads(file.read_text()) for file in sorted((tmp_path / "tiny").glob("*--seed*.json"))]
    return parts["report"].study_report(study, results, tmp_path)
