"""Memory of this process or of a GPU, now and at its peak since a moment that the program chooses."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> str:
    """Forget earlier peaks where the system allows it; returns the name of the counter."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return "torch.cuda.max_memory_allocated"
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: free pages go back, so that they do not count
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return "ru_maxrss of the whole process: an upper bound"
    return "VmHWM of the steps"


def peak_bytes(device: torch.device) -> int:
    """The most that was in memory since `reset_peak`; of the whole process where the system cannot forget a peak."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes(device: torch.device) -> int:
    """What is in memory now; call `reset_peak` first, or pages that were freed count."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS") or 0


def _status(field: str) -> int | None:
    """Bytes of a field of /proc/self/status, None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
