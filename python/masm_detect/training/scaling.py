"""The factor of the loss in fp16: without it small gradients would be zero (Micikevicius et al., arXiv 1710.03740)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossScale:
    """The factor of the loss, and the update that divides the gradients by it; both do nothing but in fp16.

    An update whose gradients are not finite is skipped and halves the factor; 2,000 updates without one double it.
    With several processes the gradients are averaged before, so that all skip the same updates.

    Args:
        precision: of the forward pass: "fp16", "bf16" or "fp32".
        device: of the weights.

    Attributes:
        skipped: updates skipped, if the optimizer does not count them itself.
    """

    def __init__(self, precision: str = "fp32", device: torch.device | str = "cpu") -> None:
        self._scaler = torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")
        self.skipped = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the factor."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the factor, for what reads them before the update."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the update, or skip it, and set the factor of the next one."""
        self._scaler.step(optimizer)
        counts = self._scaler.is_enabled() and not hasattr(type(optimizer), "skipped_steps")
        # waits for the device, as did the step of such an optimizer
        before = self._scaler.get_scale() if counts else 0.0
        self._scaler.update()
        self.skipped += counts and self._scaler.get_scale() < before

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers that resume a run bit for bit."""
        return {"scaler": self._scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, in the same precision."""
        self._scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]
