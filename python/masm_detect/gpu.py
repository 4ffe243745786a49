"""Utilisation, clocks and energy of a GPU, read through nvidia-ml-py."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class Meter:
    """One GPU, read through NVML. On a CPU, or without nvidia-ml-py, every value is None."""

    def __init__(self, device: torch.device) -> None:
        self._nvml = self._handle = None
        if device.type != "cuda":
            return
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return
        self._nvml = pynvml
        # By UUID: NVML ignores CUDA_VISIBLE_DEVICES.
        self._handle = self._query(
            pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        )

    def _query(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None

    def driver(self) -> str | None:
        """Version of the driver."""
        return None if self._nvml is None else self._query(self._nvml.nvmlSystemGetDriverVersion)

    def busy(self) -> float | None:
        """Share of the time, 0 to 1, in which a kernel ran: over NVML's last sample, of 1/6 s to 1 s."""
        rates = None if self._handle is None else self._query(self._nvml.nvmlDeviceGetUtilizationRates, self._handle)
        return None if rates is None else rates.gpu / 100

    def clocks(self) -> dict[str, Any] | None:
        """Current clocks of multiprocessors and memory (MHz), temperature (degrees Celsius) and power (watts)."""
        nvml, gpu = self._nvml, self._handle
        if gpu is None:
            return None
        power = self._query(nvml.nvmlDeviceGetPowerUsage, gpu)
        return {
            "sm_mhz": self._query(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_SM),
            "memory_mhz": self._query(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_MEM),
            "celsius": self._query(nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU),
            "watts": None if power is None else power / 1e3,
        }

    def joules(self, run: Callable[[], object], device: torch.device, seconds: float = 1.0) -> float | None:
        """Joules of one call of `run`, over a burst of about `seconds`: the counter moves only every few tens of ms."""
        if self._handle is None:
            return None
        energy = partial(self._query, self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)
        torch.cuda.synchronize(device)
        before, count, begin = energy(), 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            run()
            torch.cuda.synchronize(device)
            count += 1
        after = energy()
        return None if before is None or after is None else (after - before) / 1e3 / count


class BusyMean:
    """Mean of `Meter.busy` over time, read by `sample` at most every `every` seconds.

    A value is weighted by the time since the previous one. Call `sample` at the end of a pause, so that the pause is
    weighted by its length.
    """

    def __init__(self, meter: Meter, every: float = 0.25) -> None:
        self._meter, self._every = meter, every
        self._busy, self._seconds, self._last = 0.0, 0.0, time.perf_counter()

    def sample(self) -> None:
        """Read the utilisation, if `every` seconds have passed."""
        now = time.perf_counter()
        passed = now - self._last
        if passed < self._every:
            return
        self._last = now
        share = self._meter.busy()
        if share is not None:
            self._busy, self._seconds = self._busy + share * passed, self._seconds + passed

    @property
    def mean(self) -> float | None:
        """Share of the time in [0, 1]; None without a reading."""
        return self._busy / self._seconds if self._seconds else None
