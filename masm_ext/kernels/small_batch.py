"""Launches the CUDA C++ kernel of the strategy ``stream``: the forward pass of up to 64 rows of x.

The kernel is csrc/cuda/stream_linear.cuh, compiled into libmasm_cuda.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from .operands import aligned

OPS = torch.ops.masm


#: Columns of 16 bytes of half precision: D is a multiple.
COLUMNS = 8


def available(t: Tensor) -> bool:
    """Whether libmasm_cuda is loaded and `t` is on a GPU. (Triton's interpreter runs the other strategies on a CPU.)"""
    return _library.CUDA_LIBRARY is not None and t.is_cuda


def forward(x: Tensor, weight: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None, p: Tensor) -> Tensor:
    """y [M, N], and P = x v^T into p [M, R] float32, in one launch or two. x [M, D]."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    bias = None if bias is None else bias.contiguous()
    v = _aligned(v.contiguous())
    OPS.stream_linear(_aligned(x), _aligned(weight), u.contiguous(), s.contiguous(), v, bias, y, p)
    return y


def _aligned(t: Tensor) -> Tensor:
    """`t`, or a copy of it if its rows do not start at multiples of 16 bytes."""
    return t if aligned(t) else t.clone(memory_format=torch.contiguous_format)
