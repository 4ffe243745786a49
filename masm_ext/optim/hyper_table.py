"""The settings of the parameter groups on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cuda_graphs import is_captured


class HyperTable:
    """lr, beta1, beta2, eps and weight decay of every group, float64 [G, 5] on the device, uploaded on a change."""

    def __init__(self) -> None:
        self._values: list[tuple[float, ...]] = []
        self._table = self._host = torch.empty(0, 5, dtype=torch.float64)

    def table(self, groups: list[dict[str, Any]], device: torch.device) -> Tensor:
        own = [(i, g["lr"]) for i, g in enumerate(groups) if isinstance(g["lr"], Tensor) and not g["lr"].is_cpu]
        there = {i for i, _ in own}  # a rate on the device is copied there
        values = [
            (-1.0 if i in there else float(g["lr"]), *g["betas"], g["eps"], g["weight_decay"])
            for i, g in enumerate(groups)
        ]
        if values != self._values or self._table.device != device:
            if is_captured(device):
                raise RuntimeError(
                    "MaskedAdamW: a rate, beta, eps or weight decay changed since the last step, and replays would "
                    "restore the current value; take one step before the capture, or make lr a tensor on the device"
                )
            # The copy from pinned memory does not wait; the attribute keeps that memory alive.
            host = torch.tensor(values, dtype=torch.float64)
            self._host = host.pin_memory() if device.type == "cuda" else host
            if self._table.shape != self._host.shape or self._table.device != device:
                self._table = torch.empty_like(self._host, device=device)
            self._table.copy_(self._host, non_blocking=True)
            self._values = values
        for i, lr in own:
            self._table.select(0, i).narrow(0, 0, 1).copy_(lr)
        return self._table
