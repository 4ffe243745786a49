"""masm::fold on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..contract import check_fold
from . import products
from .launch import on_device, target_of


def fold(weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """weight + u^T diag(s) v. float64 has no kernel and uses the formula."""
    check_fold(weight, u, s, v)
    if weight.dtype == torch.float64:
        return reference.fold(weight, u, s, v)
    with on_device(weight):
        return products.fold(weight, u, s, v, target_of(weight.device))
