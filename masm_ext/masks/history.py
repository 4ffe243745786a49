"""The selections of a run: a ring on the device, which the host copies from before it is overwritten."""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any

import torch
from torch import Tensor

from ..cuda_graphs import is_captured

#: Selections that the device keeps until the host reads them.
HISTORY_ROWS = 256
#: Selections that the host keeps and the state of an optimizer holds: 9 MB for 96 layers and 3 subspaces.
HISTORY_KEPT = 1024


class SelectionHistory:
    """The selections that the host has read from the ring of ``masm::update_masks_``.

    Methods take its operands: counters int64 [2] (steps taken, selections made), ring float64 [H, L, K, 4] and steps
    int64 [H]; selection i is in row ``i % H``.
    """

    def __init__(self) -> None:
        self.entries: deque[tuple[int, Tensor]] = deque(maxlen=HISTORY_KEPT)  # (step, record [L, K, 4])
        self._read = 0  # selections copied from the ring
        self._calls = 0  # optimizer steps since the last copy

    def make_room(self, interval: int, counters: Tensor, ring: Tensor, steps: Tensor) -> None:
        """Called once a step: copies while what the steps since the last copy may have selected is still in the
        ring."""
        self._calls += 1
        if self._calls // interval + 1 >= HISTORY_ROWS and not is_captured(ring.device):
            self.read(counters, ring, steps)

    def read(self, counters: Tensor, ring: Tensor, steps: Tensor) -> None:
        """Copies the selections made since the last call. Waits for the device; warns if some were overwritten."""
        made, rows = int(counters[1]), len(ring)
        first = max(self._read, made - rows)
        if first > self._read:
            warnings.warn(
                f"LayerMasks.history: {first - self._read} selections were made on the device and overwritten before "
                "they were read, so they are not recorded; read `history` between replays of a CUDA graph",
                stacklevel=3,
            )
        places = torch.arange(first, made, device=ring.device) % rows
        self.entries.extend(zip(steps[places].tolist(), ring[places].cpu()))
        self._read, self._calls = made, 0

    def as_dicts(self) -> list[dict[str, Any]]:
        """One dict per selection: step, mask, snr, signal, power."""
        names = ("mask", "snr", "signal", "power")
        return [{"step": step, **dict(zip(names, record.movedim(-1, 0).tolist()))} for step, record in self.entries]

    def state(self, L: int, K: int) -> dict[str, Tensor]:
        """The entries as tensors: history float64 [S, L, K, 4] and history_steps int64 [S]."""
        records = [record for _, record in self.entries]
        return {
            "history": torch.stack(records) if records else torch.empty(0, L, K, 4, dtype=torch.float64),
            "history_steps": torch.tensor([step for step, _ in self.entries], dtype=torch.int64),
        }

    def restore(self, history: Tensor, history_steps: Tensor) -> None:
        """Takes entries as :meth:`state` gives them, and expects an empty ring."""
        self.entries = deque(zip(history_steps.tolist(), history.cpu().unbind()), HISTORY_KEPT)
        self._read = self._calls = 0
