"""The peak of a measurement is its own: what was allocated and freed before it does not count."""

from pathlib import Path

import pytest
import torch

MEGABYTE = 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system cannot forget a peak")
def test_earlier_peaks_and_freed_memory_do_not_count():
    import peak_memory

    cpu = torch.device("cpu")
    large = torch.ones(50 * MEGABYTE)  # 200 MB
    small = [torch.ones(MEGABYTE // 40) for _ in range(4000)]  # 400 MB in blocks that the heap keeps
    pin = small[-1]  # so that they are not at the end of the heap, from where they would go back by themselves
    del small, large
    assert peak_memory.reset_peak(cpu) == "VmHWM of the steps"
    before = peak_memory.resident_bytes(cpu)
    assert peak_memory.peak_bytes(cpu) - before < 20 * MEGABYTE
    kept = [torch.ones(MEGABYTE // 40) for _ in range(600)]  # 60 MB: not of pages that were resident before
    assert 50 * MEGABYTE < peak_memory.peak_bytes(cpu) - before < 80 * MEGABYTE
    assert len(kept) == 600 and pin[0] == 1
