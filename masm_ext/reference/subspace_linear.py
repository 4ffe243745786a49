"""The formulas of masm::subspace_linear, its group and their backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..contract import (
    check_subspace_linear,
    check_subspace_linear_backward,
    check_subspace_linear_group,
    check_subspace_linear_group_backward,
    wide,
)


def subspace_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    need_p: bool = True,
) -> tuple[Tensor, Tensor]:
    """``P = x v^T``, ``y = x weight^T + (P * s) u + bias``.

    x [..., D], weight [N, D], u [R, N], s [R], v [R, D], bias [N] -> y [..., N], P [..., R] (no columns if not need_p).
    The forward pass does not use ``mask`` and ``offsets``.
    """
    check_subspace_linear(x, weight, u, s, v, bias, mask, [0, len(s)] if offsets is None else offsets)
    p = wide(x) @ wide(v).mT  # [..., R]
    y = wide(x) @ wide(weight).mT + (p * wide(s)) @ wide(u)
    if bias is not None:
        y = y + wide(bias)
    return y.to(x.dtype), p if need_p else p.new_empty(*p.shape[:-1], 0)


def subspace_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    p: Tensor,
    mask: Tensor | None,
    offsets: Sequence[int],
    need_dx: bool = True,
    need_du: bool = True,
    need_ds: bool = True,
    need_dv: bool = True,
    need_dbias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``Q = dY u^T``, ``dX = dY weight + (Q * s) v``, ``du = (P * s)^T dY``, ``dv = (Q * s)^T x``, ``ds = sum P * Q``.

    dy [..., N], p [..., R], mask bool [K] (False = masked), offsets K + 1 row bounds of the subspaces. dX does
    not depend on the mask; rows of du, ds and dv that belong to a masked subspace are zero. A gradient that is not
    needed has no elements.
    """
    check_subspace_linear_backward(dy, x, weight, u, s, v, p, mask, offsets)
    M = math.prod(dy.shape[:-1])
    g = wide(dy).reshape(M, weight.shape[0])
    rows = wide(x).reshape(M, weight.shape[1])
    p = p.reshape(M, s.shape[0])
    sw = wide(s)
    q = g @ wide(u).mT  # [M, R]
    masked = None  # [R]: rows whose gradients are set to zero (a product would keep NaN)
    if mask is not None:
        # no copy from the host: it would wait for a GPU
        masked = ~torch.cat([mask[k].expand(end - begin) for k, (begin, end) in enumerate(pairwise(offsets))])
    dx = (g @ wide(weight) + (q * sw) @ wide(v)).to(x.dtype).reshape(x.shape) if need_dx else weight.new_empty(0)
    du = ((p * sw).mT @ g).to(u.dtype) if need_du else weight.new_empty(0)
    ds = (p * q).sum(0).to(s.dtype) if need_ds else weight.new_empty(0)
    dv = ((q * sw).mT @ rows).to(v.dtype) if need_dv else weight.new_empty(0)
    if masked is not None:
        for grad in (du, ds, dv):
            if grad.numel():
                grad.masked_fill_(masked if grad.dim() == 1 else masked[:, None], 0)
    dbias = g.sum(0).to(weight.dtype) if need_dbias else weight.new_empty(0)
    return dx, du, ds, dv, dbias


def subspace_linear_group(
    x: Tensor,
    weight: Sequence[Tensor],
    u: Sequence[Tensor],
    s: Sequence[Tensor],
    v: Sequence[Tensor],
    bias: Sequence[Tensor],
    mask: Sequence[Tensor],
    offsets: Sequence[int],
    need_p: bool = True,
    strategy: str = "",
    layer: Callable[..., tuple[Tensor, Tensor]] = subspace_linear,
) -> tuple[list[Tensor], Tensor]:
    """J layers of one shape on the same x: y J x [..., N], P [..., J R]. Lists hold one tensor a layer; bias and mask
    may be empty. ``layer`` computes each of them."""
    check_subspace_linear_group(x, weight, u, s, v, bias, mask, offsets)
    outputs = [
        layer(x, *parts, bias[j] if bias else None, mask[j] if mask else None, offsets, need_p)
        for j, parts in enumerate(zip(weight, u, s, v))
    ]
    return [y for y, _ in outputs], torch.cat([p for _, p in outputs], -1)


def subspace_linear_group_backward(
    dy: Sequence[Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
    u: Sequence[Tensor],
    s: Sequence[Tensor],
    v: Sequence[Tensor],
    p: Tensor,
    mask: Sequence[Tensor],
    offsets: Sequence[int],
    need_dx: bool,
    need_du: bool,
    need_ds: bool,
    need_dv: bool,
    need_dbias: bool,
    strategy: str = "",
    layer: Callable[..., tuple[Tensor, ...]] = subspace_linear_backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dX, the sum over the layers, and du [J R, N], ds [J R], dv [J R, D], dbias [J N], one layer after another."""
    check_subspace_linear_group_backward(dy, x, weight, u, s, v, p, mask, offsets)
    grads = [
        layer(
            *(dy[j], x, *parts, p_j, mask[j] if mask else None, offsets),
            *(need_dx, need_du, need_ds, need_dv, need_dbias),
        )
        for j, (*parts, p_j) in enumerate(zip(weight, u, s, v, p.split(s[0].shape[0], -1)))
    ]
    dx, du, ds, dv, db = zip(*grads)
    return sum(dx[1:], start=dx[0]), *(torch.cat(g) for g in (du, ds, dv, db))
