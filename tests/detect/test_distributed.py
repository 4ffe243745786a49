"""How processes divide a batch. `tests/detect/training/test_processes.py` starts some."""

from __future__ import annotations

import pytest
import torch
from masm_detect.distributed import ONE_PROCESS, _Several


def of(rank: int, size: int) -> _Several:
    """One of several processes, without a connection to the others."""
    process = _Several.__new__(_Several)
    process.rank, process.size = rank, size
    return process


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("whole", [1, 2, 3, 7, 16])
def test_the_mean_over_the_processes_is_the_mean_over_the_batch(size, whole, seed):
    losses = torch.randn(whole, dtype=torch.float64)
    processes = [of(rank, size) for rank in range(size)]
    shares = [process.share(range(whole)) for process in processes]
    means = [
        losses[list(share)].mean() * process.loss_scale(len(share), whole) for process, share in zip(processes, shares)
    ]
    torch.testing.assert_close(torch.stack(means).mean(), losses.mean())
    if whole >= size:
        assert sorted(index for share in shares for index in share) == list(range(whole))
        assert max(map(len, shares)) == -(-whole // size)  # the length to which shares of features are padded
    assert ONE_PROCESS.share(range(whole)) == range(whole) and ONE_PROCESS.loss_scale(whole, whole) == 1


def test_every_process_has_all_features_of_a_batch_smaller_than_the_processes():
    features, labels = torch.randn(2, 5), torch.tensor([0, 1])
    found = of(1, 3).features(features, labels, 2)  # a message to the others would fail here
    assert found[0] is features and found[1] is labels
