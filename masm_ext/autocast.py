"""The ops under ``torch.autocast``: they cast their arguments, and nothing inside them is cast again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """The autocast dtype for the device of ``t``; None if autocast is off."""
    device = t.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # there is no autocast on meta
        return None
    return torch.get_autocast_dtype(device)


def cast_for_autocast(x, weight, u, s, v, bias):
    """x, weight and bias in the autocast dtype; u, s, v as they are, or in float32. All but x are lists over layers."""
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == torch.float64:
        return x, weight, u, s, v, bias
    if u[0].dtype not in (dtype, torch.float32):
        u, s, v = ([t.float() for t in ts] for ts in (u, s, v))
    return x.to(dtype), [w.to(dtype) for w in weight], u, s, v, [b.to(dtype) for b in bias]


def autocast_off(t: Tensor) -> AbstractContextManager:
    """Switch autocast off for the device of ``t``: it would cast sums and factors again."""
    return nullcontext() if autocast_dtype(t) is None else torch.autocast(t.device.type, enabled=False)
