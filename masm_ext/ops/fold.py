"""masm::fold: the dense weight of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the schemas)
from ..contract import check_fold
from .derivative import register_derivative


@torch.library.register_fake("masm::fold")
def _fake(weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    check_fold(weight, u, s, v)
    return weight.new_empty(weight.shape)


def _no_gradient(ctx, grad):
    raise NotImplementedError(
        "masm::fold has no gradient: it serves merging and inference; call it under torch.no_grad()"
    )


_call = register_derivative("fold", _no_gradient, lambda ctx, inputs, output: None)


def fold(weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """The dense weight of a layer: ``weight + u^T diag(s) v``, in float32 (float64 for float64), rounded once.

    Not differentiable: for merging and inference.

    Args:
        weight: [N, D] of any floating dtype.
        u: [R, N] in the dtype of ``weight``, or float32 beside half precision.
        s: [R] in the dtype of u.
        v: [R, D] in the dtype of u.

    Returns:
        [N, D] in the dtype of ``weight``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names what arrived.
    """
    return _call(weight, u, s, v)
