"""The checks of csrc/checks.h for ops whose home on a device is the formula itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .precision import HALF, accumulate_dtype


def check_factors(op: str, weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> None:
    """weight [N, D], u [R, N], s [R], v [R, D]: shapes, dtypes, one device. Raises RuntimeError."""
    if weight.dim() != 2 or s.dim() != 1:
        raise RuntimeError(
            f"masm::{op}: expected weight [N, D] and s [R], got {list(weight.shape)} and {list(s.shape)}"
        )
    R = s.shape[0]
    for name, t, size in (("u", u, weight.shape[0]), ("v", v, weight.shape[1])):
        if t.shape != (R, size):
            raise RuntimeError(f"masm::{op}: expected {name} of shape [{R}, {size}], got {list(t.shape)}")
    if not u.dtype == s.dtype == v.dtype or u.dtype not in (weight.dtype, accumulate_dtype(weight.dtype)):
        raise RuntimeError(
            f"masm::{op}: u, s, v must have one dtype, that of weight ({weight.dtype})"
            + (" or float32" if weight.dtype in HALF else "")
            + f"; got {u.dtype}, {s.dtype}, {v.dtype}"
        )
    if {t.device for t in (u, s, v)} != {weight.device}:
        raise RuntimeError(f"masm::{op}: weight, u, s and v must be on one device, {weight.device}")


def check_input(op: str, name: str, t: Tensor, last: int, weight: Tensor) -> None:
    if t.dim() < 1 or t.shape[-1] != last:
        raise RuntimeError(f"masm::{op}: expected {name} with last dimension {last}, got shape {list(t.shape)}")
    if t.dtype != weight.dtype:
        raise RuntimeError(
            f"masm::{op}: {name} is {t.dtype}, weight {weight.dtype}; cast the input or use torch.autocast"
        )
    if t.device != weight.device:
        raise RuntimeError(f"masm::{op}: {name} is on {t.device} and weight on {weight.device}")


def check_blocks(op: str, mask: Tensor | None, offsets: Sequence[int], s: Tensor) -> None:
    """offsets: K + 1 bounds from 0 to R, the length of s; mask bool [K] on its device."""
    R = s.shape[0]
    rising = len(offsets) >= 2 and all(a <= b for a, b in pairwise(offsets))
    if not rising or offsets[0] != 0 or offsets[-1] != R:
        raise RuntimeError(
            f"masm::{op}: offsets must rise from 0 to R = {R}, with one entry more than subspaces, got {list(offsets)}"
        )
    if mask is not None and (mask.shape != (len(offsets) - 1,) or mask.dtype != torch.bool):
        raise RuntimeError(
            f"masm::{op}: expected a bool mask of shape [K] = [{len(offsets) - 1}], got {mask.dtype} {list(mask.shape)}"
        )
    if mask is not None and mask.device != s.device:
        raise RuntimeError(f"masm::{op}: mask is on {mask.device}, the factors on {s.device}: move it there")


def check_bias(op: str, bias: Tensor, weight: Tensor) -> None:
    """bias [N] in the dtype and on the device of weight."""
    if bias.dtype != weight.dtype or bias.device != weight.device:
        raise RuntimeError(f"masm::{op}: bias must have the dtype and device of weight")
    if bias.shape != weight.shape[:1]:
        raise RuntimeError(f"masm::{op}: expected bias of shape [{weight.shape[0]}], got {list(bias.shape)}")


def check_layers(
    op: str,
    weight: Sequence[Tensor],
    u: Sequence[Tensor],
    s: Sequence[Tensor],
    v: Sequence[Tensor],
    bias: Sequence[Tensor],
    mask: Sequence[Tensor],
) -> None:
    """One layer or more, all of one shape, dtype and device; a bias and a mask for all or for none."""
    J = len(weight)
    if J == 0 or {len(u), len(s), len(v)} != {J} or not {len(bias), len(mask)} <= {0, J}:
        raise RuntimeError(
            f"masm::{op}: expected u, s and v for each of the {J} weights, and bias and mask for all or none; got "
            f"{len(u)}, {len(s)}, {len(v)}, {len(bias)} and {len(mask)}"
        )
    for name, tensors in (("weight", weight), ("u", u), ("s", s), ("v", v), ("bias", bias), ("mask", mask)):
        # compared one by one: sizes that are still symbols cannot be put in a set
        kinds = [(t.shape, t.dtype, t.device) for t in tensors]
        if any(kind != kinds[0] for kind in kinds):
            raise RuntimeError(f"masm::{op}: the layers of a group must agree in {name}, got {kinds}")
