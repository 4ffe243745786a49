"""The rows of each parameter that belong to a block (one subspace of one layer), and so to one entry of the mask."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain, pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..masks import LayerMasks
from ..nn.masm_linear import LAYERS, MASMLinear

#: Elements of a segment at most on a GPU: a thread block updates one piece at a time. At 2,048 the factors of a
#: ViT-L/14 have several pieces per thread block of a large GPU, which evens out the load.
PIECE = 2048


def layers_of(params: list[Tensor], preferred: set[int]) -> list[MASMLinear]:
    """The MASMLinears that own parameters, in the order of these.

    If a shallow copy owns them too, the layer whose id is in ``preferred`` is taken; without one, ValueError."""
    owners: dict[int, list[MASMLinear]] = {}
    for layer in list(LAYERS):
        for p in (layer.u, layer.s, layer.v):
            owners.setdefault(id(p), []).append(layer)
    found: dict[int, MASMLinear] = {}
    for p in params:
        own = owners.get(id(p), [])
        own = [layer for layer in own if id(layer) in preferred] or own
        if len(own) > 1:
            raise ValueError(
                f"MaskedAdamW: a parameter of shape {list(p.shape)} belongs to {len(own)} layers, of which one is a "
                "shallow copy, and their masks may differ; pass masks=LayerMasks(model, config)"
            )
        for layer in own:
            found[id(layer)] = layer
    return list(found.values())


class Blocks:
    """The table of blocks: first the L * K (layer, subspace) pairs of the masks, then one for every other parameter."""

    def __init__(self, masks: LayerMasks | None) -> None:
        self.masks = masks
        self._rows: dict[Tensor, list[tuple[int, int, int]]] = {}  # parameter -> (begin, end, block), in elements
        self.count = 0
        if masks is None:
            return
        for row, layer in enumerate(masks.layers.values()):
            K = layer.num_subspaces
            for p in (layer.u, layer.s, layer.v):
                width = math.prod(p.shape[1:])
                self._rows[p] = [
                    (a * width, b * width, row * K + k) for k, (a, b) in enumerate(pairwise(layer.offsets))
                ]
        self.count = masks.masks.numel()

    def add(self, p: Tensor) -> None:
        if p not in self._rows:
            self._rows[p] = [(0, p.numel(), self.count)]
            self.count += 1

    def mask(self, unmasked: Tensor, claim: object) -> Tensor:
        """float32 [B] on the device of ``unmasked``, ones for the blocks without a mask."""
        if self.masks is None:
            return unmasked
        return torch.cat([self.masks.in_force(claim).view(-1), unmasked])

    @staticmethod
    def parameters(groups: list[dict[str, Any]]) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in groups)

    def segments(self, params: list[Tensor], piece: int | None) -> Tensor:
        """int64 [S, 4]: (tensor, begin, end, block). With ``piece``, for a GPU: in even pieces of at most that many
        elements, sorted by block."""
        rows = [(t, *row) for t, p in enumerate(params) for row in self._rows[p]]
        if piece is not None:
            rows = [(t, a, b, block) for t, *bounds, block in rows for a, b in pieces_of(*bounds, piece)]
            rows.sort(key=itemgetter(3))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


def pieces_of(begin: int, end: int, most: int) -> list[tuple[int, int]]:
    """[begin, end) in pieces of one size but for the last; a multiple of 8, so that 16-byte accesses stay aligned."""
    count = max(1, -(-(end - begin) // most))
    size = max(8, -(-(end - begin) // count // 8) * 8)
    return [(a, min(end, a + size)) for a in range(begin, end, size)] or [(begin, end)]
