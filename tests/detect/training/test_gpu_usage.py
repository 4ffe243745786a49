"""Peak memory and utilisation of an epoch."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from masm_detect.training import gpu_usage
from masm_detect.training.gpu_usage import GpuUsage, mean_busy


def test_what_an_epoch_takes_of_a_gpu(monkeypatch):
    resets = []
    monkeypatch.setattr(gpu_usage, "Meter", lambda device: SimpleNamespace(busy=lambda: 0.5))
    monkeypatch.setattr(gpu_usage, "BusyMean", partial(gpu_usage.BusyMean, every=0.0))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77)
    usage = GpuUsage(torch.device("cuda", 1))
    for epoch in range(2):
        usage.start()
        assert len(resets) == epoch + 1
        assert usage.numbers() == {"peak_memory_bytes": 77, "gpu_busy": None}
        usage.sample()
        assert usage.numbers() == {"peak_memory_bytes": 77, "gpu_busy": 0.5}
    history = [{"seconds": 1.0, "gpu_busy": 0.2}, {"seconds": 3.0, "gpu_busy": 0.6}, {"seconds": 9.0, "gpu_busy": None}]
    assert mean_busy(history) == pytest.approx(0.5)
    assert mean_busy([{"seconds": 1.0}]) is None
