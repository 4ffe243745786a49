"""Launches the CUDA kernels for a few rows of x, the strategy ``stream``: csrc/cuda/stream_linear.cuh and
small_gradients.cuh, from libmasm_cuda. J layers of one shape go through one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _library
from ..ops.homes import STREAM_ROWS
from .products import as_rows

OPS = torch.ops.masm


def available(t: Tensor) -> bool:
    """Is libmasm_cuda there for `t`? (Triton's interpreter runs the other strategies on a CPU.)"""
    return _library.CUDA_LIBRARY is not None and t.is_cuda


def serves_gradients(dy: Tensor) -> bool:
    return available(dy) and math.prod(dy.shape[:-1]) <= STREAM_ROWS


def forward(
    x: Tensor,
    weight: Sequence[Tensor],
    u: Sequence[Tensor],
    s: Sequence[Tensor],
    v: Sequence[Tensor],
    bias: Sequence[Tensor],
    need_p: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """y J x [M, N] and P [M, J R] (None if not needed), in one launch or two. x [M, D]."""
    M, J, R = x.shape[0], len(weight), s[0].shape[0]
    y = [x.new_empty(M, weight[0].shape[0]) for _ in weight]
    p = x.new_empty(M, J * R, dtype=torch.float32)  # two kernels pass it on even where nobody else reads it
    factors = ([t.contiguous() for t in ts] for ts in (u, s, v, bias))
    OPS.stream_linear(x, _of_one_row_stride(weight), *factors, y, p)
    return y, p if need_p else None


def product(zs: Sequence[Tensor], b: Tensor, out: Tensor) -> None:
    """out [M, J R] float32 = Z_j B_j^T side by side, in one launch. zs J x [M, W], b [J R, W]."""
    if out.numel() > 0:
        OPS.stream_product(_of_one_row_stride(zs), b.split(b.shape[0] // len(zs)), out)


def gradients(
    dys: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    mask: Sequence[Tensor],
    offsets: Sequence[int],
    du: Tensor | None,
    dv: Tensor | None,
    ds: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Write those of du [J R, N], dv [J R, D], ds [J R] and dbias [J N] that are given, in one launch."""
    if any(t is not None for t in (du, dv, ds, dbias)):
        masks = [m.contiguous() for m in mask]
        OPS.small_gradients(_of_one_row_stride(dys), x, s, p, q, masks, list(offsets), du, dv, ds, dbias)


def _of_one_row_stride(matrices: Sequence[Tensor]) -> list[Tensor]:
    """With contiguous rows, and one stride for all: copied only where they do not lie so."""
    rows = [as_rows(t) for t in matrices]
    return rows if len({t.stride(0) for t in rows}) == 1 else [t.contiguous() for t in rows]
