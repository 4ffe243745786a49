"""What code that may run under CUDA graph capture has to know."""

from __future__ import annotations

import torch


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph of the current stream is being captured on ``device``: nothing may wait then, and replays
    repeat every copy."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
