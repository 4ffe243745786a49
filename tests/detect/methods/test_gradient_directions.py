"""masm along directions of the gradient, measured through a fitted head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from masm_detect.config import ConfigError, MasmOptions, MethodConfig
from masm_detect.evaluation.runs import load_run
from masm_detect.methods.build import build_method
from masm_detect.methods.fitted_head import fitted_head
from masm_detect.methods.method import Calibration
from masm_detect.training.run import train
from run_folders import assert_same_run
from tiny import detector, die_at, run_config
from torch.nn.functional import binary_cross_entropy_with_logits

from masm_ext.nn.masm_linear import masm_layers

MASM = MasmOptions(num_subspaces=2, subspace_rank=2, directions="gradient", lift=0.25, mask_policy="none")


def images(seed: int = 0, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and noise with stripes."""
    pixels = torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % 2
    pixels[labels == 1, :, :, ::4] += 2
    return pixels, labels


def loss(model, batch) -> torch.Tensor:
    return binary_cross_entropy_with_logits(model(batch[0]), batch[1].float())


def test_the_head_separates_the_classes_and_is_put_back():
    model = detector().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = images()
    with fitted_head(model, [batch]), torch.no_grad():
        assert float(((model.eval()(batch[0]) > 0) == (batch[1] == 1)).float().mean()) > 0.9
        model.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with (
        pytest.raises(ConfigError, match="the first 32 are of one class"),
        fitted_head(model, [(batch[0][batch[1] == 1], batch[1][batch[1] == 1])]),
    ):
        pass


def test_the_directions_hold_more_of_the_gradient_than_others():
    shares = {}
    for directions in ("gradient", "trailing", "leading"):
        model, data = detector(), [images(seed) for seed in range(4)]
        config = MethodConfig(name="masm", masm=replace(MASM, directions=directions))
        build_method("masm", model, config, seed=1, calibration=Calibration(data, loss))
        layers = list(masm_layers(model).values())
        with fitted_head(model, data):
            value = sum(loss(model.eval(), batch) for batch in data)
            of_u = torch.autograd.grad(value, [layer.u for layer in layers])  # row i: s_i times the gradient along v_i
        shares[directions] = sum(float((g / layer.s[:, None]).square().sum()) for g, layer in zip(of_u, layers))
    assert shares["gradient"] > 1.5 * max(shares["trailing"], shares["leading"])


def test_without_calibration_it_is_refused():
    with pytest.raises(ConfigError, match="need calibration batches"):
        build_method("masm", detector(), MethodConfig(name="masm", masm=MASM), seed=1)
    with pytest.raises(ConfigError, match="needs a lift above 0"):
        build_method("masm", detector(), MethodConfig(name="masm", masm=replace(MASM, lift=0.0)), seed=1)


def test_a_run_is_resumed_bit_for_bit_and_loaded(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    """The directions are measured again when a run goes on, and come out the same."""

    def config_of(name: str):
        config = run_config(tiny_data, tiny_backbone, tmp_path / name)
        masm = replace(
            config.method.masm, directions="gradient", lift=0.25, orthogonality=0.0, spectral_consistency=0.0
        )
        return replace(config, method=replace(config.method, masm=masm))

    result = train(config_of("whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(7, patch)
        train(config_of("killed"))
    torch.manual_seed(999)
    train(replace(config_of("killed"), resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert next(iter(masm_layers(result.detector).values())).directions[0] < 0
    _, loaded = load_run(tmp_path / "whole", torch.device("cpu"))
    pixels, _ = images()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(pixels), result.detector.eval()(pixels), rtol=1e-5, atol=1e-5)
