"""The formula of masm::fold."""

from __future__ import annotations

from torch import Tensor

from ..contract import check_fold, wide


def fold(weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """``weight + u^T diag(s) v``, the dense weight of a layer, rounded once to the dtype of ``weight``.

    weight [N, D], u [R, N], s [R], v [R, D] -> [N, D].
    """
    check_fold(weight, u, s, v)
    return (wide(weight) + (wide(u).mT * wide(s)) @ wide(v)).to(weight.dtype)
