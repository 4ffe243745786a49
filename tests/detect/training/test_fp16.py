"""Training in fp16: the loss is scaled, overflowing steps are skipped, and a resumed run goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from masm_detect.training import loop, scaling
from masm_detect.training.checkpoint import load
from masm_detect.training.run import train
from run_folders import assert_same_run
from tiny import die_at, run_config


def in_fp16(*arguments, **optim):
    config = run_config(*arguments)
    runtime = replace(config.runtime, precision="fp16")
    return replace(config, optim=replace(config.optim, **optim), runtime=runtime)


@pytest.fixture
def overflowing(monkeypatch):
    """A first scale at which gradients overflow: one from which a few steps are skipped."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(scaling.torch.amp, "GradScaler", lambda *a, **k: real(*a, init_scale=2.0**127, **k))


@pytest.mark.parametrize("method", ["masm", "ln"])
@pytest.mark.parametrize("clip", [None, 0.1], ids=["not clipped", "clipped"])
@pytest.mark.usefixtures("overflowing")
def test_killed_and_resumed_equals_uninterrupted(tiny_data, tiny_backbone, tmp_path, monkeypatch, method, clip):
    whole = train(in_fp16(tiny_data, tiny_backbone, tmp_path / "whole", method, grad_clip=clip))
    config = in_fp16(tiny_data, tiny_backbone, tmp_path / "killed", method, grad_clip=clip)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(7, patch)
        train(config)
    killed = load(tmp_path / "killed" / "last")["loss_scale"]["scaler"]["scale"]
    assert killed < 2.0**127
    resumed = train(replace(config, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert resumed.fit.skipped_steps == whole.fit.skipped_steps > 0
    ends = [load(tmp_path / name / "last")["loss_scale"]["scaler"] for name in ("whole", "killed")]
    assert ends[0] == ends[1] and ends[0]["scale"] < 2.0**127


@pytest.mark.parametrize("method", ["masm", "lora"])
def test_fp16_learns_as_fp32_does(tiny_data, tiny_backbone, tmp_path, method):
    if method == "lora":
        pytest.importorskip("peft")
    half = train(in_fp16(tiny_data, tiny_backbone, tmp_path / "half", method))
    single = train(run_config(tiny_data, tiny_backbone, tmp_path / "single", method))
    losses = [[entry["train_loss"] for entry in run.fit.history] for run in (half, single)]
    assert losses[0] != losses[1] and losses[0][-1] < losses[0][0]
    # the first scale may be too large for a few steps
    assert losses[0] == pytest.approx(losses[1], rel=0.3) and half.fit.skipped_steps < 5


def test_the_forward_pass_is_in_float16(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    seen = set()
    real = loop.train_step

    def looking(model, *arguments, **options):
        hook = model.backbone.register_forward_hook(lambda m, x, y: seen.add(y.dtype))
        weight = next(m for m in model.modules() if type(m).__name__ == "MASMLinear")
        second = weight.register_forward_hook(lambda m, x, y: seen.add(y.dtype))
        out = real(model, *arguments, **options)
        hook.remove()
        second.remove()
        return out

    monkeypatch.setattr(loop, "train_step", looking)
    train(in_fp16(tiny_data, tiny_backbone, tmp_path / "run", epochs=1))
    assert torch.float16 in seen and torch.bfloat16 not in seen
