"""A run folder is complete, loads, and holds the chosen epoch."""

from __future__ import annotations

from dataclasses import replace

import torch
from masm_detect.config import OptimConfig
from masm_detect.data.frames import frame_dataset
from masm_detect.data.sources import source_splits
from masm_detect.evaluation.predict import score_samples
from masm_detect.evaluation.runs import load_run
from masm_detect.training.run import train
from tiny import run_config


def test_run_folder_is_complete_and_loads(tiny_data, tiny_backbone, tmp_path):
    for method in ("full", "osf", "masm"):
        out = tmp_path / method
        result = train(run_config(tiny_data, tiny_backbone, out, method))
        names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert {"config.yaml", "environment.json", "groups.json", "metrics.json", "history.jsonl"} <= names
        assert {"adapter/adapter.json", "last/state.json", "plots/history.png"} <= names
        assert ("plots/masks.png" in names) == ("plots/drift.png" in names) == (method == "masm")
        assert not [name for name in names if name.endswith(".tmp")]
        config, detector = load_run(out)
        _, val = source_splits(config.data)
        scores = [score_samples(d, frame_dataset(val, d.backbone, config.data)) for d in (result.detector, detector)]
        torch.testing.assert_close(*map(torch.from_numpy, scores), rtol=1e-5, atol=1e-6)


def test_learns_and_keeps_the_best_epoch(tiny_data, tiny_backbone, tmp_path):
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "full", optim=OptimConfig(epochs=6, batch_size=4))
    result = train(replace(config, method=replace(config.method, lr=3e-3)))
    assert result.fit.best_val_auc == max(entry["val_auc"] for entry in result.fit.history) > 0.9


def test_static_masks_choose_layers(tiny_data, tiny_backbone, tmp_path):
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", optim=OptimConfig(epochs=1, batch_size=4))
    options = replace(config.method.masm, mask_policy="static", mask_active_fraction=0.25)
    result = train(replace(config, method=replace(config.method, masm=options)))
    assert len(result.fit.history[-1]["drift"]) == 2  # of 8 attention projections
    load_run(tmp_path / "run")
