"""Peak memory and utilisation of the GPU during training, epoch by epoch."""

from __future__ import annotations

from typing import Any

import torch

from masm_detect.gpu import BusyMean, Meter


class GpuUsage:
    """Peak memory and utilisation of one epoch; empty on the CPU. A resumed epoch counts from where it was resumed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._meter = Meter(device) if device.type == "cuda" else None

    def start(self) -> None:
        """Begin an epoch."""
        if self._meter is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._busy = BusyMean(self._meter)

    def sample(self) -> None:
        """Read the utilisation, at most every quarter of a second."""
        if self._meter is not None:
            self._busy.sample()

    def numbers(self) -> dict[str, Any]:
        """{"peak_memory_bytes", "gpu_busy": share of the time in [0, 1] or None}; {} on the CPU."""
        if self._meter is None:
            return {}
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(self._device), "gpu_busy": self._busy.mean}


def mean_busy(history: list[dict[str, Any]]) -> float | None:
    """Mean "gpu_busy" of the epochs, weighted by their seconds; None if no epoch has one."""
    known = [entry for entry in history if entry.get("gpu_busy") is not None]
    seconds = sum(entry["seconds"] for entry in known)
    return sum(entry["gpu_busy"] * entry["seconds"] for entry in known) / seconds if seconds else None
