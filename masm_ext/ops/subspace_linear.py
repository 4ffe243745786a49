"""masm::subspace_linear and its backward: fake, autograd and public function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the schemas)
from ..autocast import cast_for_autocast
from ..contract import accumulate_dtype, check_subspace_linear, check_subspace_linear_backward
from ..quantized_weight import dense_weight, is_quantized
from .derivative import register_derivative


@torch.library.register_fake("masm::subspace_linear")
def _fake(x, weight, u, s, v, bias, mask, offsets, need_p=True, strategy=""):
    check_subspace_linear(x, weight, u, s, v, bias, mask, offsets)
    N = weight.shape[0]
    y = x.new_empty(*x.shape[:-1], N)
    return y, x.new_empty(*x.shape[:-1], s.shape[0] if need_p else 0, dtype=accumulate_dtype(x.dtype))


@torch.library.register_fake("masm::subspace_linear_backward")
def _fake_backward(
    dy, x, weight, u, s, v, p, mask, offsets, need_dx, need_du, need_ds, need_dv, need_dbias, strategy=""
):
    check_subspace_linear_backward(dy, x, weight, u, s, v, p, mask, offsets)

    def like(t: Tensor, needed: bool) -> Tensor:
        return t.new_empty(t.shape) if needed else weight.new_empty(0)

    dbias = weight.new_empty(weight.shape[0] if need_dbias else 0)
    return like(x, need_dx), like(u, need_du), like(s, need_ds), like(v, need_dv), dbias


def setup_context(ctx, inputs, output) -> None:
    x, weight, u, s, v, _, mask, offsets, need_p, strategy = inputs
    _, p = output
    ctx.mark_non_differentiable(p)
    ctx.set_materialize_grads(False)
    # Only dv needs x, only du and ds need P, and neither is needed if every subspace is masked. The mask is read on the
    # CPU only: elsewhere the host would wait, and a tracer has no value.
    live = not (type(mask) is Tensor and mask.is_cpu and not mask.any())
    keep_x, keep_p = live and ctx.needs_input_grad[4], live and any(ctx.needs_input_grad[2:4])
    ctx.save_for_backward(x if keep_x else None, weight, u, s, v, p if keep_p else None, mask)
    if keep_p and not need_p:
        raise RuntimeError("masm::subspace_linear: the gradients of u and s need p; call it with need_p=True")
    ctx.dropped = not live
    ctx.strategy = strategy
    ctx.x_shape = x.shape
    ctx.offsets = offsets


def backward(ctx, dy: Tensor | None, _dp: Tensor | None):
    x, weight, u, s, v, p, mask = ctx.saved_tensors
    if dy is None:
        return (None,) * 10
    need_x, need_weight, need_u, need_s, need_v, need_bias = ctx.needs_input_grad[:6]
    if need_weight:
        raise RuntimeError(
            "masm::subspace_linear: weight is the frozen principal subspace and has no gradient; "
            "call weight.requires_grad_(False)"
        )
    if ctx.dropped and mask.any():
        raise RuntimeError(
            "masm::subspace_linear: every subspace was masked in the forward pass, so x was not kept, but the mask has "
            "changed since; change masks between steps"
        )
    if type(weight) is not Tensor and is_quantized(weight):  # of ops/quantized.py
        weight = dense_weight(weight, dy.dtype)
    M = dy.shape[:-1]
    if x is None:  # not read: a view of one element with the right shape
        x = dy.new_empty(1).expand(ctx.x_shape)
    if p is None:
        p = dy.new_empty(1, dtype=accumulate_dtype(dy.dtype)).expand(*M, s.shape[0])
    grads = _call_backward(
        dy, x, weight, u, s, v, p, mask, ctx.offsets, need_x, need_u, need_s, need_v, need_bias, ctx.strategy
    )
    dx, du, ds, dv, db = (
        g if needed else None for g, needed in zip(grads, (need_x, need_u, need_s, need_v, need_bias))
    )
    return dx, None, du, ds, dv, db, None, None, None, None


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "masm::subspace_linear has no second derivative: differentiate once, without create_graph"
    )


_call = register_derivative("subspace_linear", backward, setup_context)
_call_backward = register_derivative("subspace_linear_backward", _no_double_backward)


def subspace_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    offsets: Sequence[int] | None = None,
    mask: Tensor | None = None,
    strategy: str = "",
) -> Tensor:
    """``y = x weight^T + ((x v^T) * s) u + bias``: a frozen dense product plus K artifact subspaces.

    Args:
        x: [..., D], float32, float64, bfloat16 or float16.
        weight: [N, D] in the dtype of x, the frozen principal subspace. It never gets a gradient.
        u: [R, N], the output directions of all subspaces, in the dtype of x, or float32 for a half-precision x. P and
            all sums are float32; products of half-precision calls may round u and v to the dtype of x (on a CPU with
            AVX512_BF16 they do).
        s: [R], the singular values, in the dtype of u.
        v: [R, D], the input directions, in the dtype of u.
        bias: [N] in the dtype of x, or None.
        offsets: K + 1 row bounds of the subspaces in u, s and v; None: one subspace.
        mask: bool [K]; where it is False, the gradients of the subspace are zero and are not computed. y and dX depend
            on it in rounding only (if all subspaces are masked, a CPU may fold the weight). None: no mask.
        strategy: name of the strategy for a CUDA call, from ``masm_ext.ops.strategies.STRATEGIES``; "": chosen by the
            RULES there. For tests and benchmarks; it changes the result in rounding only.

    Returns:
        y [..., N] in the dtype of x. Under ``torch.autocast``, x, weight and bias are cast to the autocast dtype, which
        y then has; u, s and v are not cast.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names what arrived.
    """
    x, [weight], [u], [s], [v], bias_list = cast_for_autocast(
        x, [weight], [u], [s], [v], [] if bias is None else [bias]
    )
    if offsets is None:
        offsets = [0, s.shape[0]]
    need_p = torch.is_grad_enabled() and (u.requires_grad or s.requires_grad)
    bias = bias_list[0] if bias_list else None
    return _call(x, weight, u, s, v, bias, mask, list(offsets), need_p, strategy)[0]
