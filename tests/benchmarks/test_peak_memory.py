"""The peak of a measurement is its own: what was allocated and freed before it does not count."""

from pathlib import Path

import pytest
import torch

MEGABYTE = 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system cannot forget a peak")
def test_earlier_peaks_and_freed_memory_do_not_count():
    import peak_memory

    cpu = torch.device("cpu")
    many = [torch.ones(MEGABYTE // 40) for _ in range(4000)]  # 400 MB in small blocks, which the heap keeps
    large = torch.ones(50 * MEGABYTE)  # 200 MB
    del many, large
    assert peak_memory.reset_peak(cpu) == "VmHWM of the steps"
    before = peak_memory.resident_bytes(cpu)
    assert peak_memory.peak_bytes(cpu) - before < 20 * MEGABYTE
    kept = torch.ones(15 * MEGABYTE)
    assert 50 * MEGABYTE < peak_memory.peak_bytes(cpu) - before < 80 * MEGABYTE
    assert kept.sum() == kept.numel()
