"""Brings the losses of the training steps to the host without stalling the GPU."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepLoss:
    """Mean task loss and penalty of step number `step` over its `images` images."""

    step: int
    images: int
    task: float
    penalty: float


class StepLosses:
    """Returns the losses of the steps in order.

    On CUDA the losses of a step are copied while the next one is launched, and read one step late, so the host does not
    wait for the step it has just launched. `drain` waits for all. On the CPU losses are read at once.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[int, int, Tensor, Tensor, Any]] = deque()

    def put(self, step: int, images: int, task: Tensor, penalty: Tensor) -> list[StepLoss]:
        """Add the losses (scalars) of a step; returns those that have arrived."""
        event = None
        if task.is_cuda:
            stream = torch.cuda.current_stream(task.device)
            task, penalty = (loss.to("cpu", non_blocking=True) for loss in (task, penalty))  # into pinned memory
            event = torch.cuda.Event()
            event.record(stream)
        self._pending.append((step, images, task, penalty, event))
        return self._read(0 if event is None else 1)

    def drain(self) -> list[StepLoss]:
        """All losses that `put` has not returned yet."""
        return self._read(0)

    def _read(self, left: int) -> list[StepLoss]:
        arrived = []
        while len(self._pending) > left:
            step, images, task, penalty, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            arrived.append(StepLoss(step, images, task.item(), penalty.item()))
        return arrived
