"""Training by forgeries: runs with every order of the batches, masks by agreement and specialists, and resuming."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from masm_detect.config import ConfigError, OptimConfig
from masm_detect.training import loop
from masm_detect.training.run import train
from run_folders import assert_same_run
from tiny import die_at, run_config


@pytest.fixture
def two_forgeries(tiny_data):
    """The tiny data set, half of its fakes of another forgery."""
    for number in range(0, 12, 2):
        file = tiny_data / "fake-stripes" / f"{number:02d}.png"
        (tiny_data / "fake-bars").mkdir(exist_ok=True)
        shutil.move(file, tiny_data / "fake-bars" / file.name)
    return tiny_data


def config_of(data, backbone, out, order, **masm):
    config = run_config(data, backbone, out, optim=OptimConfig(epochs=3, batch_size=4, batches=order))
    return replace(config, method=replace(config.method, masm=replace(config.method.masm, **masm)))


@pytest.mark.parametrize(
    ("order", "masm"),
    [
        ("paired", {}),
        ("alternating", {}),
        ("alternating", {"mask_statistic": "agreement"}),
        ("alternating", {"mask_policy": "specialists"}),
        ("random", {"mask_policy": "random"}),
        ("random", {"lift": 0.5, "orthogonality": 0.0, "spectral_consistency": 0.0}),
    ],
    ids=["paired", "alternating", "agreement", "specialists", "random masks", "lift"],
)
def test_killed_and_resumed_equals_uninterrupted(two_forgeries, tiny_backbone, tmp_path, monkeypatch, order, masm):
    whole = train(config_of(two_forgeries, tiny_backbone, tmp_path / "whole", order, **masm))
    config = config_of(two_forgeries, tiny_backbone, tmp_path / "killed", order, **masm)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(7, patch)
        train(config)
    torch.manual_seed(999)
    resumed = train(replace(config, resume=True))
    assert resumed.fit.steps == whole.fit.steps
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("masm", [{"mask_policy": "specialists"}, {"mask_statistic": "agreement"}])
def test_masks_by_forgery_need_alternating_batches(tmp_path, masm):
    with pytest.raises(ConfigError, match=r"optim\.batches is 'random'; it must be alternating"):
        config_of(tmp_path, tmp_path, tmp_path / "run", "random", **masm)


def test_weights_that_move_far_are_warned_of_once(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LARGEST_DRIFT", 0.0)
    with pytest.warns(UserWarning, match=r"after epoch 1, \|\|dW\|\| / \|\|W\|\| of .* the backbone forgets") as told:
        train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "effort"))
    assert sum("the backbone forgets" in str(warning.message) for warning in told) == 1
    monkeypatch.setattr(loop, "LARGEST_DRIFT", 1e9)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the backbone forgets")
        train(run_config(tiny_data, tiny_backbone, tmp_path / "other", "effort"))
