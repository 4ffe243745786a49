"""The checks of the arguments of every op: one function per op.

The fake (shape inference, meta tensors, torch.compile, torch.export), the formula and the Python implementations call
them. csrc/contract.h holds the same checks in C++, with the same messages (tests/ops/test_contract.py compares them).
All raise RuntimeError with what was expected and what arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALF)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of P, of every sum and of u, s, v: float32 for half precision, else ``dtype`` itself."""
    return torch.float32 if dtype in HALF else dtype


def wide(t: Tensor) -> Tensor:
    """``t`` in its accumulate dtype."""
    return t.to(accumulate_dtype(t.dtype))


def fail(op: str, text: str) -> None:
    raise RuntimeError(f"masm::{op}: {text}")


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def check_shape(op: str, name: str, t: Tensor, *shape: int) -> None:
    # compared one by one: sizes may be symbols while tracing
    if t.dim() != len(shape) or any(a != b for a, b in zip(t.shape, shape)):
        fail(op, f"expected {name} of shape {list(shape)}, got {list(t.shape)}")


def check_dims(op: str, name: str, t: Tensor, letters: str) -> None:
    """``letters``: the dimensions by name, as in "N, D"."""
    if t.dim() != letters.count(",") + 1:
        fail(op, f"expected {name} of shape [{letters}], got {list(t.shape)}")


def check_last(op: str, name: str, t: Tensor, last: int) -> None:
    if t.dim() < 1 or t.shape[-1] != last:
        fail(op, f"expected {name} of shape [..., {last}], got {list(t.shape)}")


def check_dtype(op: str, name: str, t: Tensor, *allowed: torch.dtype) -> None:
    if t.dtype not in allowed:
        fail(op, f"expected {name} of dtype {' or '.join(map(dtype_name, allowed))}, got {dtype_name(t.dtype)}")


def check_device(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.device != like.device:
        fail(op, f"{name} is on {t.device}, {like_name} on {like.device}; all tensors must be on one device")


def check_contiguous(op: str, name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        fail(op, f"{name} must be contiguous, got strides {list(t.stride())}")


def check_factors(op: str, weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> None:
    """weight [N, D], u [R, N], s [R], v [R, D]; factors in the dtype of weight, or float32 beside half precision."""
    check_dims(op, "weight", weight, "N, D")
    check_dims(op, "s", s, "R")
    (N, D), R = weight.shape, s.shape[0]
    check_shape(op, "u", u, R, N)
    check_shape(op, "v", v, R, D)
    check_dtype(op, "weight", weight, *FLOATS)
    check_dtype(op, "u", u, *dict.fromkeys((weight.dtype, accumulate_dtype(weight.dtype))))
    check_dtype(op, "s", s, u.dtype)
    check_dtype(op, "v", v, u.dtype)
    for name, t in (("u", u), ("s", s), ("v", v)):
        check_device(op, name, t, "weight", weight)


def check_rows(op: str, name: str, t: Tensor, last: int, weight: Tensor) -> None:
    """Rows of activations [..., last], in the dtype and on the device of weight."""
    check_last(op, name, t, last)
    check_dtype(op, name, t, weight.dtype)
    check_device(op, name, t, "weight", weight)


def check_offsets(op: str, offsets: Sequence[int], R: int) -> None:
    rising = len(offsets) >= 2 and all(a <= b for a, b in pairwise(offsets))
    if not rising or offsets[0] != 0 or offsets[-1] != R:
        fail(op, f"expected K + 1 offsets that rise from 0 to R = {R}, got {list(offsets)}")


def check_mask(op: str, mask: Tensor | None, offsets: Sequence[int], weight: Tensor) -> None:
    """bool [K], one entry a subspace."""
    if mask is not None:
        check_shape(op, "mask", mask, len(offsets) - 1)
        check_dtype(op, "mask", mask, torch.bool)
        check_device(op, "mask", mask, "weight", weight)


def check_bias(op: str, bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None:
        check_shape(op, "bias", bias, weight.shape[0])
        check_dtype(op, "bias", bias, weight.dtype)
        check_device(op, "bias", bias, "weight", weight)


def check_subspace_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    offsets: Sequence[int],
    op: str = "subspace_linear",
) -> None:
    check_factors(op, weight, u, s, v)
    check_rows(op, "x", x, weight.shape[1], weight)
    check_offsets(op, offsets, s.shape[0])
    check_mask(op, mask, offsets, weight)
    check_bias(op, bias, weight)


def check_subspace_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    p: Tensor,
    mask: Tensor | None,
    offsets: Sequence[int],
    op: str = "subspace_linear_backward",
    layers: int = 1,
) -> None:
    """``layers``: p [..., layers R] holds the P of that many layers side by side."""
    check_factors(op, weight, u, s, v)
    (N, D), R = weight.shape, s.shape[0]
    check_rows(op, "dy", dy, N, weight)
    check_rows(op, "x", x, D, weight)
    check_shape(op, "x", x, *dy.shape[:-1], D)
    check_shape(op, "p", p, *dy.shape[:-1], layers * R)
    check_dtype(op, "p", p, accumulate_dtype(weight.dtype))
    check_device(op, "p", p, "weight", weight)
    check_offsets(op, offsets, R)
    check_mask(op, mask, offsets, weight)


def check_group(op: str, J: int, optional: Sequence[str], **lists: Sequence[Tensor]) -> None:
    """Lists of J tensors, alike within a list; those named in ``optional`` may be empty."""
    if J < 1:
        fail(op, "expected at least one layer, got none")
    for name, tensors in lists.items():
        if len(tensors) != J and not (name in optional and len(tensors) == 0):
            fail(op, f"expected {J} tensors in {name}, one a layer, got {len(tensors)}")
        for j, t in enumerate(tensors[1:], start=1):
            check_shape(op, f"{name}[{j}]", t, *tensors[0].shape)
            check_dtype(op, f"{name}[{j}]", t, tensors[0].dtype)
            check_device(op, f"{name}[{j}]", t, f"{name}[0]", tensors[0])


def check_subspace_linear_group(
    x: Tensor,
    weight: Sequence[Tensor],
    u: Sequence[Tensor],
    s: Sequence[Tensor],
    v: Sequence[Tensor],
    bias: Sequence[Tensor],
    mask: Sequence[Tensor],
    offsets: Sequence[int],
) -> None:
    op = "subspace_linear_group"
    check_group(op, len(weight), ("bias", "mask"), weight=weight, u=u, s=s, v=v, bias=bias, mask=mask)
    first = (t[0] if t else None for t in (bias, mask))
    check_subspace_linear(x, weight[0], u[0], s[0], v[0], *first, offsets, op=op)


def check_subspace_linear_group_backward(
    dy: Sequence[Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
    u: Sequence[Tensor],
    s: Sequence[Tensor],
    v: Sequence[Tensor],
    p: Tensor,
    mask: Sequence[Tensor],
    offsets: Sequence[int],
) -> None:
    op, J = "subspace_linear_group_backward", len(weight)
    check_group(op, J, ("mask",), dy=dy, weight=weight, u=u, s=s, v=v, mask=mask)
    first = mask[0] if mask else None
    check_subspace_linear_backward(dy[0], x, weight[0], u[0], s[0], v[0], p, first, offsets, op=op, layers=J)


def check_fold(weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> None:
    check_factors("fold", weight, u, s, v)


def check_subspace_penalty(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    s: Sequence[Tensor],
    v: Sequence[Tensor],
    s0: Sequence[Tensor],
    weight_norm2: Sequence[Tensor],
    offsets: Sequence[int],
    subspaces: Sequence[int],
) -> list[tuple[int, ...]]:
    """Returns the K + 1 row bounds of each layer."""
    op, L = "subspace_penalty", len(weights)
    if L < 1:
        fail(op, "expected at least one layer, got none")
    lists = dict(u=u, s=s, v=v, s0=s0, weight_norm2=weight_norm2, subspaces=subspaces)
    for name, items in lists.items():
        if len(items) != L:
            fail(op, f"expected {L} entries in {name}, one a layer, got {len(items)}")
    starts = [0, *accumulate(k + 1 for k in subspaces)]
    if min(subspaces) < 1 or starts[-1] != len(offsets):
        fail(op, f"expected K + 1 offsets for each of the subspaces {list(subspaces)}, got {len(offsets)} offsets")
    bounds = [tuple(offsets[a:b]) for a, b in pairwise(starts)]
    for i, bound in enumerate(bounds):
        layer = f"{op}: layer {i}"
        check_factors(layer, weights[i], u[i], s[i], v[i])
        check_offsets(layer, bound, s[i].shape[0])
        check_shape(layer, "s0", s0[i], *s[i].shape)
        check_dtype(layer, "s0", s0[i], s[i].dtype)
        if weight_norm2[i].numel() != 1:
            fail(layer, f"expected weight_norm2 of one element, got {list(weight_norm2[i].shape)}")
        check_dtype(layer, "weight_norm2", weight_norm2[i], s[i].dtype)
        check_dtype(layer, "u", u[i], u[0].dtype)
        check_device(layer, "s0", s0[i], "weight", weights[i])
        check_device(layer, "weight_norm2", weight_norm2[i], "weight", weights[i])
        check_device(layer, "weight", weights[i], "that of layer 0", weights[0])
    return bounds


def check_masked_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    penalties: Sequence[Tensor],
    steps: Tensor,
    mask: Tensor,
    segments: Tensor,
    hyper: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Does not check the values of ``mask`` and ``segments``: the host would wait for a GPU. Implementations do."""
    op, T = "masked_adamw_", len(params)
    check_dims(op, "mask", mask, "B")
    B = mask.shape[0]
    lists = dict(grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, penalties=penalties)
    for name, tensors in lists.items():
        if len(tensors) != T and not (name == "penalties" and len(tensors) == 0):
            fail(op, f"expected {T} tensors in {name}, one a parameter, got {len(tensors)}")
    # hundreds of parameters a step: one fast test each, and names are formatted only for an error
    place, given = mask.device, [tensors or [None] * T for tensors in lists.values()]
    for i, (p, *rest) in enumerate(zip(params, *given)):
        dtype, shape, moment = p.dtype, p.shape, accumulate_dtype(p.dtype)
        if (
            dtype in FLOATS
            and p.device == place
            and p.is_contiguous()
            and all(
                t is None
                or (t.dtype == wanted and t.device == place and t.is_contiguous() and t.shape == shape)
                or (penalty and t.numel() == 0)
                for t, wanted, penalty in zip(rest, (dtype, moment, moment, moment), (False, False, False, True))
            )
        ):
            continue
        own = f"params[{i}]"
        check_dtype(op, own, p, *FLOATS)
        check_contiguous(op, own, p)
        check_device(op, own, p, "mask", mask)
        for name, tensors in lists.items():
            if name == "penalties" and (len(tensors) == 0 or tensors[i].numel() == 0):
                continue
            t, entry = tensors[i], f"{name}[{i}]"
            check_shape(op, entry, t, *p.shape)
            check_dtype(op, entry, t, p.dtype if name == "grads" else accumulate_dtype(p.dtype))
            check_contiguous(op, entry, t)
            check_device(op, entry, t, "mask", mask)
    check_operand(op, "mask", mask, "mask", mask, torch.float32, B)
    check_operand(op, "steps", steps, "mask", mask, torch.int64, B)
    check_dims(op, "segments", segments, "S, 4")
    check_operand(op, "segments", segments, "mask", mask, torch.int64, segments.shape[0], 4)
    check_operand(op, "hyper", hyper, "mask", mask, torch.float64, T, 5)
    for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if scalar is not None:
            check_operand(op, name, scalar, "mask", mask, torch.float32, 1)


def check_operand(op: str, name: str, t: Tensor, like_name: str, like: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """A contiguous tensor of one shape and dtype, on the device of ``like``."""
    check_shape(op, name, t, *shape)
    check_dtype(op, name, t, dtype)
    check_contiguous(op, name, t)
    check_device(op, name, t, like_name, like)


def check_update_masks(
    sums: Tensor,
    counts: Tensor,
    masks: Tensor,
    live: Tensor,
    counters: Tensor,
    history: Tensor,
    history_steps: Tensor,
    stats: Tensor,
    found: Tensor,
    owned: Tensor,
    decay: float,
    warmup: int,
    interval: int,
    hysteresis: float,
    keep: int,
    threshold: float,
    least: int,
    probe_interval: int,
    probe_steps: int,
    select: bool,
) -> None:
    op = "update_masks_"
    check_dims(op, "sums", sums, "2, L, K")
    check_dims(op, "history", history, "H, L, K, 4")
    check_dims(op, "stats", stats, "B, 2")
    (_, L, K), H, B = sums.shape, history.shape[0], stats.shape[0]
    for name, t, dtype, shape in (
        ("sums", sums, torch.float64, (2, L, K)),
        ("counts", counts, torch.int64, (2, L, K)),
        ("masks", masks, torch.float32, (2, L, K)),
        ("live", live, torch.bool, (L, K)),
        ("counters", counters, torch.int64, (2,)),
        ("history", history, torch.float64, (H, L, K, 4)),
        ("history_steps", history_steps, torch.int64, (H,)),
        ("stats", stats, torch.float64, (B, 2)),
        ("found", found, torch.float32, (1,)),
        ("owned", owned, torch.bool, (L, K)),
    ):
        check_operand(op, name, t, "sums", sums, dtype, *shape)
    if B < L * K:
        fail(op, f"expected stats of L * K = {L * K} rows or more, got {B}")
    if H < 1:
        fail(op, "expected history of one row or more, got none")
    if interval < 1:
        fail(op, f"expected an interval of 1 or more, got {interval}")
    if not (0 <= keep <= L and 0 <= least <= L):
        fail(op, f"expected keep and least between 0 and L = {L}, got {keep} and {least}")
