"""What NVML says, through a stand-in for it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from masm_detect import meter
from masm_detect.meter import BusyMean, Meter

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


def test_nothing_is_known_without_nvml_or_on_a_cpu(nvml, monkeypatch):
    def answers(device):
        one = Meter(device)
        return [one.busy(), one.driver(), one.clocks(), one.joules(lambda: None, device)]

    assert answers(CPU) == [None] * 4
    nvml.nvmlInit = refuses
    assert answers(CUDA) == [None] * 4
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert answers(CUDA) == [None] * 4


def test_the_mean_asks_now_and_then(monkeypatch):
    now, rates = [0.0], iter([0.2, None, 0.6])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    busy = BusyMean(SimpleNamespace(busy=lambda: next(rates)), every=0.25)
    assert busy.mean is None
    for now[0] in (0.0, 0.2, 0.25, 0.3, 0.49, 0.6, 0.7, 0.9):  # asked at 0.25, 0.6 and 0.9
        busy.sample()
    assert busy.mean == pytest.approx(0.4)
    with pytest.raises(StopIteration):
        next(rates)
