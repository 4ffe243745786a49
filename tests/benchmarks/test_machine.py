"""Clocks and energy of the machine."""

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("masm_detect.results", reason="needs the extra masm_ext[detect]")
CPU = torch.device("cpu")


def test_joules_of_a_call_are_its_share_of_the_counter(monkeypatch):
    import machine

    class NVMLError(Exception):
        pass

    counter = iter([1_000_000, 1_006_000])  # millijoules before and after
    calls = []
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    device = torch.device("cuda")
    joules = machine.Meter(device).joules(lambda: calls.append(1), device, seconds=0.001)
    assert joules == pytest.approx(6.0 / len(calls))
    assert machine.Meter(CPU).joules(lambda: None, CPU) is None and machine.Meter(CPU).clocks() is None
