"""The linear products with a frozen weight of 8 bits, a tensor type of torchao.

The dense weight exists only during the call: the forward pass makes it, and the backward pass makes it again. What
autograd keeps is the weight of 8 bits. All products are those of the other ops. Under torch.compile these functions run
as they are, between two compiled parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import autocast_dtype, cast_for_autocast
from ..quantized_weight import dense_weight
from .derivative import below_autograd
from .subspace_linear import backward, setup_context, subspace_linear


@torch.compiler.disable
def quantized_subspace_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    offsets: Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`masm_ext.ops.subspace_linear` for a quantised ``weight``; results are those for its dense values.

    Args:
        x: [..., D].
        weight: [N, D], a tensor type of torchao. It never gets a gradient.
        u, s, v, bias, offsets, mask: as for :func:`masm_ext.ops.subspace_linear`.

    Returns:
        y [..., N] in the dtype of x (under autocast: in its dtype).
    """
    x, _, [u], [s], [v], bias_list = cast_for_autocast(x, [], [u], [s], [v], [] if bias is None else [bias])
    bias = bias_list[0] if bias_list else None
    if not torch.is_grad_enabled():
        return subspace_linear(x, dense_weight(weight, x.dtype), u, s, v, bias, offsets=offsets, mask=mask)
    offsets = [0, s.shape[0]] if offsets is None else list(offsets)
    need_p = u.requires_grad or s.requires_grad
    return _SubspaceLinear.apply(x, weight, u, s, v, bias, mask, offsets, need_p, "")[0]


@torch.compiler.disable
def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` for a quantised, frozen ``weight`` [N, D]; x [..., D] -> [..., N] in the dtype of x.

    Under autocast, x and bias are cast to its dtype. ``bias`` may be trained.
    """
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias)


class _SubspaceLinear(torch.autograd.Function):
    """The op on the dense weight, with the op's own derivative; the quantised weight is what the context keeps."""

    @staticmethod
    def forward(ctx, x, weight, *rest):
        with below_autograd():
            results = torch.ops.masm.subspace_linear.default(x, dense_weight(weight, x.dtype), *rest)
        setup_context(ctx, (x, weight, *rest), results)
        return results

    @staticmethod
    def backward(ctx, dy, dp):
        return backward(ctx, dy, dp)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return F.linear(x, dense_weight(weight, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        dx = dy @ dense_weight(weight, dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
