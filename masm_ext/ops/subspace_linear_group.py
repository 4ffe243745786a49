"""Layers of one shape that read the same x (query, key and value) as one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _library, reference  # noqa: F401  (_library loads the schemas)
from ..autocast import cast_for_autocast
from ..contract import (
    accumulate_dtype,
    check_subspace_linear_group,
    check_subspace_linear_group_backward,
    fail,
)
from .derivative import register_derivative


@torch.library.register_fake("masm::subspace_linear_group")
def _fake(x, weight, u, s, v, bias, mask, offsets, need_p, strategy):
    check_subspace_linear_group(x, weight, u, s, v, bias, mask, offsets)
    N = weight[0].shape[0]
    R = len(s) * s[0].shape[0] if need_p else 0
    y = [x.new_empty(*x.shape[:-1], N) for _ in weight]
    return y, x.new_empty(*x.shape[:-1], R, dtype=accumulate_dtype(x.dtype))


@torch.library.register_fake("masm::subspace_linear_group_backward")
def _fake_backward(dy, x, weight, u, s, v, p, mask, offsets, need_dx, need_du, need_ds, need_dv, need_dbias, strategy):
    check_subspace_linear_group_backward(dy, x, weight, u, s, v, p, mask, offsets)

    def of_all(t: Tensor, needed: bool) -> Tensor:
        return t.new_empty(len(weight) * t.shape[0], *t.shape[1:]) if needed else weight[0].new_empty(0)

    dx = x.new_empty(x.shape) if need_dx else weight[0].new_empty(0)
    dbias = weight[0].new_empty(len(weight) * weight[0].shape[0] if need_dbias else 0)
    return dx, of_all(u[0], need_du), of_all(s[0], need_ds), of_all(v[0], need_dv), dbias


def lie_side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors of one size follow one another in one storage, so that they can be read as one."""
    start, offset, size = tensors[0].data_ptr(), tensors[0].storage_offset(), tensors[0].numel()
    step = size * tensors[0].itemsize
    # equal growth of addresses and offsets implies one storage; reading the storage itself is slow
    return all(
        t.is_contiguous() and t.data_ptr() == start + i * step and t.storage_offset() == offset + i * size
        for i, t in enumerate(tensors)
    )


def _on_cpu(x, weight, u, s, v, bias, mask, offsets, need_p, strategy):
    def layer(*arguments):
        return torch.ops.masm.subspace_linear(*arguments, strategy)

    return reference.subspace_linear_group(x, weight, u, s, v, bias, mask, offsets, need_p, layer=layer)


def _backward_on_cpu(
    dy, x, weight, u, s, v, p, mask, offsets, need_dx, need_du, need_ds, need_dv, need_dbias, strategy
):
    def layer(*arguments):
        return torch.ops.masm.subspace_linear_backward(*arguments, strategy)

    needs = (need_dx, need_du, need_ds, need_dv, need_dbias)
    return reference.subspace_linear_group_backward(dy, x, weight, u, s, v, p, mask, offsets, *needs, layer=layer)


torch.library.impl("masm::subspace_linear_group", "cpu", _on_cpu)
torch.library.impl("masm::subspace_linear_group_backward", "cpu", _backward_on_cpu)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, u, s, v, _, mask, offsets, need_p, strategy = inputs
    _, p = output
    ctx.mark_non_differentiable(p)
    ctx.set_materialize_grads(False)
    # by argument: the gradients of a list are needed together or not at all
    lists = [[t] if isinstance(t, Tensor) else t for t in inputs[:6]]
    ctx.needs = [any(t.requires_grad for t in tensors) for tensors in lists]
    keep_p = any(ctx.needs[2:4])
    if keep_p and not need_p:
        raise RuntimeError("masm::subspace_linear_group: the gradients of u and s need p; call it with need_p=True")
    ctx.save_for_backward(x if ctx.needs[4] else None, p if keep_p else None, *weight, *u, *s, *v, *mask)
    ctx.layers, ctx.x_shape, ctx.offsets, ctx.strategy = len(weight), x.shape, offsets, strategy
    ctx.counts = [len(t) for t in inputs[1:7]]


def _backward(ctx, dy: Sequence[Tensor | None], _dp: Tensor | None):
    x, p, *rest = ctx.saved_tensors
    J = ctx.layers
    weight, u, s, v, mask = (rest[i * J : (i + 1) * J] for i in range(5))
    nothing = [[None] * count for count in ctx.counts]
    given = [d for d in dy if d is not None]
    if not given:
        return None, *nothing, None, None, None
    need_x, need_weight, need_u, need_s, need_v, need_bias = ctx.needs
    if need_weight:
        raise RuntimeError(
            "masm::subspace_linear_group: weight is the frozen principal subspace and has no gradient; "
            "call weight.requires_grad_(False)"
        )
    dy = [given[0].new_zeros(given[0].shape) if d is None else d for d in dy]
    R = s[0].shape[0]
    if x is None:  # not read: a view of one element with the right shape
        x = given[0].new_empty(1).expand(ctx.x_shape)
    if p is None:
        p = given[0].new_empty(1, dtype=accumulate_dtype(given[0].dtype)).expand(*ctx.x_shape[:-1], J * R)
    dx, *grads = _call_backward(
        dy, x, weight, u, s, v, p, mask, ctx.offsets, need_x, need_u, need_s, need_v, need_bias, ctx.strategy
    )
    du, ds, dv, db = (
        list(g.chunk(J)) if needed else [None] * J for g, needed in zip(grads, (need_u, need_s, need_v, need_bias))
    )
    db = db if ctx.counts[4] else []
    return dx if need_x else None, nothing[0], du, ds, dv, db, nothing[5], None, None, None


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "masm::subspace_linear_group has no second derivative: differentiate once, without create_graph"
    )


_call = register_derivative("subspace_linear_group", _backward, _setup_context)
_call_backward = register_derivative("subspace_linear_group_backward", _no_double_backward)


def subspace_linear_group(
    x: Tensor,
    weight: Sequence[Tensor],
    u: Sequence[Tensor],
    s: Sequence[Tensor],
    v: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    *,
    offsets: Sequence[int] | None = None,
    mask: Sequence[Tensor] = (),
    strategy: str = "",
) -> list[Tensor]:
    """J layers on the same x in one call, with the results of :func:`subspace_linear`.

    On CUDA one pass over x computes ``P = x v^T`` of all layers, one product their outputs, and dX is summed over the
    layers before it is rounded. Tensors that follow one another in one storage (:meth:`masm_ext.MASMLinear.group`
    arranges this) are read in place; others are copied first. With J > 4 or J R > 256, and on a CPU, the layers run one
    by one.

    Args:
        x: [..., D].
        weight: J tensors [N, D].
        u: J tensors [R, N].
        s: J tensors [R].
        v: J tensors [R, D].
        bias: J tensors [N], or none.
        offsets: K + 1 row bounds, the same for all layers; None: one subspace.
        mask: J tensors bool [K], or none.
        strategy: as for :func:`subspace_linear`.

    Returns:
        J outputs [..., N].

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message gives what was passed.
    """
    if not len(weight):
        fail("subspace_linear_group", "expected at least one layer, got none")
    x, weight, u, s, v, bias = cast_for_autocast(x, list(weight), list(u), list(s), list(v), list(bias))
    if offsets is None:
        offsets = [0, s[0].shape[0]]
    need_p = torch.is_grad_enabled() and any(t.requires_grad for t in (*u, *s))
    return list(_call(x, weight, u, s, v, bias, list(mask), list(offsets), need_p, strategy)[0])
