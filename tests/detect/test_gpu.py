"""GPU readings, with a fake NVML."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from masm_detect import gpu
from masm_detect.gpu import BusyMean, Meter

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class NVMLError(Exception):
    pass


def refuses(*_):
    raise NVMLError


@pytest.fixture
def nvml(monkeypatch) -> SimpleNamespace:
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=75, memory=10),
        nvmlSystemGetDriverVersion=lambda: "999.1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return fake


def test_joules_of_a_call_are_its_share_of_the_counter(nvml):
    counter, calls = iter([1_000_000, 1_006_000]), []  # millijoules before and after
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(counter)
    joules = Meter(CUDA).joules(lambda: calls.append(1), CUDA, seconds=0.001)
    assert joules == pytest.approx(6.0 / len(calls))


def test_busy_and_driver(nvml):
    assert Meter(CUDA).busy() == 0.75 and Meter(CUDA).driver() == "999.1"
    nvml.nvmlDeviceGetUtilizationRates = nvml.nvmlSystemGetDriverVersion = refuses
    assert Meter(CUDA).busy() is Meter(CUDA).driver() is None


def test_the_driver_is_known_where_the_gpu_is_not_found(nvml):
    nvml.nvmlDeviceGetHandleByUUID = refuses
    assert Meter(CUDA).driver() == "999.1" and Meter(CUDA).busy() is Meter(CUDA).clocks() is None


def test_every_value_is_none_without_nvml_or_on_a_cpu(nvml, monkeypatch):
    def answers(device):
        one = Meter(device)
        return [one.busy(), one.driver(), one.clocks(), one.joules(lambda: None, device)]

    assert answers(CPU) == [None] * 4
    nvml.nvmlInit = refuses
    assert answers(CUDA) == [None] * 4
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert answers(CUDA) == [None] * 4


def test_the_mean_reads_at_intervals(monkeypatch):
    now, rates = [0.0], iter([0.2, None, 0.6])
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])
    busy = BusyMean(SimpleNamespace(busy=lambda: next(rates)), every=0.25)
    assert busy.mean is None
    for now[0] in (0.0, 0.2, 0.25, 0.3, 0.49, 0.6, 0.7, 0.9):  # read at 0.25, 0.6 and 0.9
        busy.sample()
    assert busy.mean == pytest.approx((0.25 * 0.2 + 0.3 * 0.6) / 0.55)
    with pytest.raises(StopIteration):
        next(rates)


def test_a_pause_weighs_as_long_as_it_lasts(monkeypatch):
    """Batches come in bursts: 2 s of waiting, then 0.8 s of steps of 50 ms, by an NVML that looks back over 1/6 s."""
    now = [0.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])

    def looks_back():
        inside = now[0] % 2.8 - 2.0  # seconds into the burst
        return min(1.0, inside * 6) if inside > 0 else 0.0

    busy = BusyMean(SimpleNamespace(busy=looks_back))
    for burst in range(20):
        for step in range(16):
            now[0] = 2.8 * burst + 2.0 + 0.05 * step  # a batch has arrived
            busy.sample()
    assert busy.mean == pytest.approx(0.8 / 2.8, abs=0.03)
