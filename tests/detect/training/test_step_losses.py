"""The losses of a step: at once on the CPU, one step late on CUDA, in order, none lost."""

from __future__ import annotations

import pytest
import torch
from masm_detect.training import step_losses
from masm_detect.training.step_losses import StepLoss, StepLosses


class OnCuda:
    """A scalar on a GPU whose copy holds its value only once the event after it was waited for."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, value, log):
        self.value, self.log, self.copied = value, log, False

    def to(self, device, non_blocking=False):
        assert device == "cpu" and non_blocking
        self.log.append(self)
        return self

    def item(self):
        assert self.copied, "read before the copy has ended"
        return self.value


@pytest.fixture
def log(monkeypatch) -> list:
    """Copies under way; an event ends those before it."""
    log: list = []

    class Event:
        def record(self, stream):
            assert stream == "stream of cuda:0"
            self.before = list(log)

        def synchronize(self):
            for copy in self.before:
                copy.copied = True

    monkeypatch.setattr(step_losses.torch.cuda, "Event", Event)
    monkeypatch.setattr(step_losses.torch.cuda, "current_stream", lambda device: f"stream of {device}")
    return log


def test_on_the_cpu_at_once():
    losses = StepLosses()
    for step in range(3):
        assert losses.put(step, 4, torch.tensor(0.1), torch.tensor(2.0)) == [
            StepLoss(step, 4, torch.tensor(0.1).item(), 2.0)
        ]
    assert losses.drain() == []


def test_on_cuda_one_step_late(log):
    losses = StepLosses()
    seen = []
    for step in range(4):
        arrived = losses.put(step, 10 + step, OnCuda(float(step), log), OnCuda(-float(step), log))
        assert [loss.step for loss in arrived] == ([step - 1] if step else [])
        assert not log[-1].copied  # the step that was just launched was not waited for
        seen += arrived
    seen += losses.drain()
    assert seen == [StepLoss(step, 10 + step, float(step), -float(step)) for step in range(4)]
    assert losses.drain() == []
    assert losses.put(4, 1, OnCuda(4.0, log), OnCuda(0.0, log)) == []
    assert [loss.step for loss in losses.drain()] == [4]
