"""masm::subspace_penalty: fake, autograd and public function."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the schemas)
from ..autocast import autocast_off
from ..contract import accumulate_dtype, check_subspace_penalty, fail
from .derivative import register_derivative


@torch.library.register_fake("masm::subspace_penalty")
def _fake(weights, u, s, v, s0, weight_norm2, offsets, subspaces, need_gradients):
    check_subspace_penalty(weights, u, s, v, s0, weight_norm2, offsets, subspaces)
    elements = sum(t.numel() for t in (*u, *v, *s)) if need_gradients else 0
    dtype = accumulate_dtype(u[0].dtype)
    return u[0].new_empty((), dtype=dtype), u[0].new_empty((), dtype=dtype), u[0].new_empty(2, elements, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    weights, u, s, v, _, _, _, _, need_gradients = inputs
    gradients = output[2]
    ctx.mark_non_differentiable(gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradients, *u, *v, *s)
    ctx.shapes = [t.shape for t in (*u, *v, *s)]
    ctx.dtype = u[0].dtype
    ctx.has_gradients = need_gradients
    ctx.weight_needs_gradient = any(t.requires_grad for t in weights)


class _NotTwice(torch.autograd.Function):
    """The first of its arguments, without a derivative: ``gradients`` has no graph, so a second derivative would be a
    silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(
            "masm::subspace_penalty has no second derivative: differentiate once, without create_graph"
        )


def _backward(ctx, g_orthogonality: Tensor | None, g_spectral: Tensor | None, _):
    L = len(ctx.shapes) // 3
    none = [None] * L
    if g_orthogonality is None and g_spectral is None:
        return *[none] * 6, None, None, None
    if ctx.weight_needs_gradient:
        raise RuntimeError(
            "masm::subspace_penalty: weight is the frozen principal subspace and has no gradient; "
            "call weight.requires_grad_(False)"
        )
    if not ctx.has_gradients:
        raise RuntimeError("masm::subspace_penalty was called with need_gradients=False and cannot be differentiated")
    gradients, *factors = ctx.saved_tensors
    # one scaled sum over the whole model, cut into the parameters afterwards
    if g_orthogonality is None:
        flat = gradients[1] * g_spectral
    else:
        flat = gradients[0] * g_orthogonality
        if g_spectral is not None:
            flat = torch.addcmul(flat, gradients[1], g_spectral)
    if torch.is_grad_enabled():  # create_graph, or torch.func
        flat = _NotTwice.apply(flat, *factors)
    pieces = flat.to(ctx.dtype).split([shape.numel() for shape in ctx.shapes])
    pieces = [piece.view(shape) for piece, shape in zip(pieces, ctx.shapes)]
    return none, pieces[:L], pieces[2 * L :], pieces[L : 2 * L], none, none, None, None, None


_call = register_derivative("subspace_penalty", _backward, _setup_context)


def subspace_penalty(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    s: Sequence[Tensor],
    v: Sequence[Tensor],
    s0: Sequence[Tensor],
    weight_norm2: Sequence[Tensor],
    offsets: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """The orthogonality and spectral consistency penalties, summed over L layers; gradients come from the same pass.

    Formulas: :func:`masm_ext.reference.subspace_penalty`. Each argument is a list with one entry per layer; the layers
    may have different shapes. Autocast is disabled inside. First derivatives only.

    Args:
        weights: [N, D] each, the frozen principal subspaces, of any floating dtype. They never get a gradient.
        u: [R, N] each, in the dtype of the weights, or float32 for half-precision weights.
        s: [R] each, in the dtype of u.
        v: [R, D] each, in the dtype of u.
        s0: [R] each, the singular values at init.
        weight_norm2: one element each, ``||weight||_F^2``, in the dtype of s.
        offsets: K + 1 row bounds of the subspaces of each layer.

    Returns:
        (orthogonality, spectral consistency), two scalars in float32 (float64 for float64 layers), differentiable in u,
        s and v.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message gives the layer and what was passed.
    """
    if not len(u):
        fail("subspace_penalty", "expected at least one layer, got none")
    need_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (*u, *s, *v))
    arguments = (
        *(list(x) for x in (weights, u, s, v, s0, weight_norm2)),
        list(chain.from_iterable(offsets)),
        [len(x) - 1 for x in offsets],
        need_gradients,
    )
    with autocast_off(u[0]):
        return _call(*arguments)[:2]
