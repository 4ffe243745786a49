"""Operands as the kernels read them: the factors and masks of J layers, one layer after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.subspace_linear_group import lie_side_by_side


class Factor(NamedTuple):
    """The artifact part of X A + (T * s) C, T = X V^T: (s, v, u) in the forward product, (s, u, v) for dX.

    s [J R]; v and c [J R, ...].
    """

    s: Tensor
    v: Tensor
    c: Tensor


class Live(NamedTuple):
    """Masks as kernels read them: uint8 [J K] on the GPU, or None; `offsets` are the K + 1 row bounds of one layer."""

    mask: Tensor | None
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, masks: Sequence[Tensor], offsets: Sequence[int]) -> Live:
        return cls(side_by_side(masks).view(torch.uint8) if masks else None, tuple(offsets))

    @property
    def constants(self) -> dict[str, Any]:
        given = self.mask is not None and self.offsets[-1] > 0
        return dict(HAS_MASK=given, OFFSETS=self.offsets if given else None)


def as_rows(t: Tensor) -> Tensor:
    """[..., W] as a matrix with contiguous rows; copied only if they are not."""
    rows = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, along the first dimension: a view if they are adjacent in memory, else a copy."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.contiguous()
    if lie_side_by_side(tensors):
        return first.as_strided((len(tensors) * first.shape[0], *first.shape[1:]), first.stride())
    return torch.cat([t.contiguous() for t in tensors])


def by_layer(t: Tensor, layers: int) -> Tensor:
    """[J rows, ...] as [J, rows, ...]."""
    return t.view(layers, t.shape[0] // layers, *t.shape[1:])


def aligned(*matrices: Tensor) -> bool:
    """Whether tiles can be moved 16 bytes at a time: contiguous rows that do not overlap, at multiples of 16 bytes."""
    return all(
        t.numel() == 0
        or (
            t.stride(1) == 1
            and t.stride(0) >= t.shape[1]
            and t.stride(0) * t.itemsize % 16 == 0
            and t.data_ptr() % 16 == 0
        )
        for t in matrices
    )
