"""Launches the CUDA C++ kernel of the strategy ``stream``, the forward pass of a few rows of x:
csrc/cuda/stream_linear.cuh, from libmasm_cuda. J layers of one shape go through one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _library
from .products import aligned

OPS = torch.ops.masm


#: Columns of 16 bytes of half precision: D is a multiple.
COLUMNS = 8


def available(t: Tensor) -> bool:
    """Is libmasm_cuda there for `t`? (Triton's interpreter runs the other strategies on a CPU.)"""
    return _library.CUDA_LIBRARY is not None and t.is_cuda


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
    x, weight = _aligned(x), [_aligned(w) for w in weight]
    if len({w.stride(0) for w in weight}) > 1:  # the kernel takes one row stride
        weight = [w.contiguous() for w in weight]
    y = [x.new_empty(M, weight[0].shape[0]) for _ in weight]
    p = x.new_empty(M, J * R, dtype=torch.float32)  # a first launch may write it for the second
    factors = [t.contiguous() for t in u], [t.contiguous() for t in s], [_aligned(t.contiguous()) for t in v]
    OPS.stream_linear(x, weight, *factors, [t.contiguous() for t in bias], y, p)
    return y, p if need_p else None


def _aligned(t: Tensor) -> Tensor:
    """With rows that start at multiples of 16 bytes: `t`, or a copy where they do not."""
    return t if aligned(t) else t.clone(memory_format=torch.contiguous_format)
