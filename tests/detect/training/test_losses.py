"""Losses that arrive late, and losses and weights that are not finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
from masm_detect.errors import TrainingError
from masm_detect.training import checkpoint, loop
from masm_detect.training.run import train
from masm_detect.training.step_losses import StepLosses
from run_folders import assert_same_run
from tiny import die_at, run_config


class OneStepLate(StepLosses):
    """Losses that arrive as they do on a GPU."""

    def __init__(self):
        super().__init__()
        self.held = []

    def put(self, *arguments):
        arrived, self.held = self.held, super().put(*arguments)
        return arrived

    def drain(self):
        arrived, self.held = self.held, []
        return arrived


@pytest.mark.parametrize("method", ["probe", "masm"])
def test_losses_that_arrive_late_change_nothing(tiny_data, tiny_backbone, tmp_path, monkeypatch, method):
    train(run_config(tiny_data, tiny_backbone, tmp_path / "whole", method))
    monkeypatch.setattr(loop, "StepLosses", OneStepLate)
    train(run_config(tiny_data, tiny_backbone, tmp_path / "late", method))
    assert_same_run(tmp_path / "whole", tmp_path / "late")
    config = run_config(tiny_data, tiny_backbone, tmp_path / "killed", method)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(7, patch)
        train(config)
    train(replace(config, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("losses", [StepLosses, OneStepLate])
@pytest.mark.parametrize(
    ("bad", "every", "kept"),
    [(2, 0, None), (4, 0, None), (14, 0, 10), (5, 3, 5), (6, 1, 6), (14, 1, 14)],  # 4 and 14 end an epoch
)
def test_a_loss_that_is_not_finite_is_reported_with_its_step(
    tiny_data, tiny_backbone, tmp_path, monkeypatch, losses, bad, every, kept
):
    real, calls = loop.train_step, iter(range(99))

    def breaking(*arguments, **options):
        task, penalty = real(*arguments, **options)
        return task * (float("nan") if next(calls) == bad else 1), penalty

    monkeypatch.setattr(loop, "train_step", breaking)
    monkeypatch.setattr(loop, "StepLosses", losses)
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe")
    with pytest.raises(TrainingError, match=f"the loss became nan at step {bad}: lower"):
        train(replace(config, runtime=replace(config.runtime, checkpoint_every=every)))
    last = tmp_path / "run" / "last"
    assert last.exists() == (kept is not None)
    if kept is not None:  # written before the bad step
        assert checkpoint.load(last)["position"]["step"] == kept


@pytest.mark.parametrize(("every", "kept"), [(2, 6), (0, 5)])
def test_weights_that_are_not_finite_are_never_a_checkpoint(
    tiny_data, tiny_backbone, tmp_path, monkeypatch, every, kept
):
    """A gradient may overflow in a step whose loss is finite; its weights must not be written."""
    real, calls = loop.train_step, iter(range(99))

    def overflowing(detector, *arguments, **options):
        if next(calls) == 7:  # the eighth step
            handle = detector.head.weight.register_hook(lambda grad: grad * float("inf"))
            losses = real(detector, *arguments, **options)
            handle.remove()
            return losses
        return real(detector, *arguments, **options)

    monkeypatch.setattr(loop, "train_step", overflowing)
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe")
    message = "the weights are not finite after step 8" if every else "the loss became nan at step 8"
    with pytest.raises(TrainingError, match=message):
        train(replace(config, runtime=replace(config.runtime, checkpoint_every=every)))
    state = checkpoint.load(tmp_path / "run" / "last")
    assert state["position"]["step"] == kept and all(w.isfinite().all() for w in state["weights"].values())


def test_a_step_that_masm_skips_is_not_in_the_mean(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    real, calls = loop.train_step, iter(range(99))

    def breaking(detector, method, images, *arguments, **options):
        return real(detector, method, images * (float("nan") if next(calls) == 1 else 1), *arguments, **options)

    monkeypatch.setattr(loop, "train_step", breaking)
    first, *_ = train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "masm")).fit.history
    assert first["skipped_steps"] == 1 and first["images"] == 20 and 0.3 < first["train_loss"] < 1.5
