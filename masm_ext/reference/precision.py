from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of P, of every sum and of u, s, v: float32 for half precision, else ``dtype`` itself."""
    return torch.float32 if dtype in HALF else dtype


def wide(t: Tensor) -> Tensor:
    return t.to(accumulate_dtype(t.dtype))
