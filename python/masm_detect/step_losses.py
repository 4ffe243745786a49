"""The losses of the training steps on their way to the host."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepLoss:
    """What step number `step` reported: mean task loss and penalty over `images` images."""

    step: int
    images: int
    task: float
    penalty: float


class StepLosses:
    """Hands over the losses of step after step, in order.

    On CUDA the host does not wait for a step that it has just launched: its losses are copied while the next one is
    being launched, and read then, one step late. `drain` waits for all. On the CPU they are read at once.
    """

    def __init__(self) -> None:
        self._on_the_way: deque[tuple[int, int, Tensor, Tensor, Any]] = deque()

    def put(self, step: int, images: int, task: Tensor, penalty: Tensor) -> list[StepLoss]:
        """Take the losses (scalars) of a step; returns what has arrived."""
        event = None
        if task.is_cuda:
            stream = torch.cuda.current_stream(task.device)
            task, penalty = (loss.to("cpu", non_blocking=True) for loss in (task, penalty))  # into pinned memory
            event = torch.cuda.Event()
            event.record(stream)
        self._on_the_way.append((step, images, task, penalty, event))
        return self._read(0 if event is None else 1)

    def drain(self) -> list[StepLoss]:
        """All that was not handed over yet."""
        return self._read(0)

    def _read(self, left: int) -> list[StepLoss]:
        arrived = []
        while len(self._on_the_way) > left:
            step, images, task, penalty, event = self._on_the_way.popleft()
            if event is not None:
                event.synchronize()
            arrived.append(StepLoss(step, images, task.item(), penalty.item()))
        return arrived
