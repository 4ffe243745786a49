"""masm::subspace_penalty on CUDA: the two readings of every weight by one launch each for all layers of a shape.

The rest of the formula works on [R, R], [R, N] and [R, D] matrices, stacked over the layers of a shape, and stays in
torch (``masm_ext.reference.subspace_penalty``): the number of launches does not grow with the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference.subspace_penalty import weight_products as plain_products
from . import skinny, tuning
from .launch import Target, Tile, on_device, padded, run, target_of
from .products import chunk_rows_of
from .tiles import BOTH, BOTH_MAX_RANK, tiles

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
#: Tables of addresses by the addresses they hold, so that a training step copies none to the GPU.
_tables: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
_MAX_TABLES = 64


def subspace_penalty(*arguments):
    """As ``masm_ext.reference.subspace_penalty``. float64 weights have no kernel: plain products serve them."""
    device = arguments[0][0].device
    with on_device(arguments[0][0]):
        products = partial(weight_products, target=target_of(device))
        return reference.subspace_penalty(*arguments, products=products)


def weight_products(
    weights: Sequence[Tensor], a: Tensor, b: Tensor, target: Target, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """``a weight`` [L, R, D] and ``b weight^T`` [L, R, N] in float32, each weight [N, D] read once for up to 64 rows.

    a [L, R, N], b [L, R, D] float32. Products in three tf32 parts ("tf32x3"), as exact as float32.
    """
    if a.dtype == torch.float64:
        return plain_products(weights, a, b)
    (L, R, D), (N, dtype) = b.shape, (weights[0].shape[0], weights[0].dtype)
    weights = [
        w if w.is_contiguous() and w.data_ptr() % 16 == 0 else w.clone(memory_format=torch.contiguous_format)
        for w in weights
    ]
    table = _table(weights)
    a_weight, b_weight = [], []
    for begin in range(0, R, BOTH_MAX_RANK):
        rows = slice(begin, min(R, begin + BOTH_MAX_RANK))
        a_part, b_part = a[:, rows].contiguous(), b[:, rows].contiguous()
        r = b_part.shape[1]
        out: list[Tensor] = []

        def launch(tile: Tile, a_part=a_part, b_part=b_part, r=r, out=out) -> None:
            tiles_d = triton.cdiv(D, tile.BN)
            chunk = chunk_rows_of(N, tile.BM, tiles_d * L, target)
            chunks = triton.cdiv(N, chunk)
            out[:] = b.new_empty(L, tiles_d, N, r), b.new_empty(L, chunks, r, D)
            constants = dict(TABLE=True, DTYPE=_TYPES[dtype], HAS_MASK=False, HAS_SUM=False, PRECISION="tf32x3")
            sizes = dict(BM=tile.BM, BW=tile.BN, BR=padded(r), warps=tile.warps, stages=tile.stages)
            # a [r, N] is T [N, r] transposed: its row stride is 1
            operands = (table, b_part, a_part, *out, None, None, None, N, D, r, D, 1, N, r, 0, chunk)
            run(skinny.skinny_both, (tiles_d, chunks, L), *operands, **constants, **sizes)

        if tile is None:
            candidates = tiles(BOTH, target, torch.float32, "tf32")
            key = tuning.key_of("penalty", N, dtype, D, r, L)
            launch(tuning.choose(target, key, candidates, launch))
        else:
            launch(tile)
        wb, aw = out
        a_weight.append(aw.sum(1))
        b_weight.append(wb.sum(1).mT)
    return torch.cat(a_weight, 1), torch.cat(b_weight, 1)


def _table(weights: Sequence[Tensor]) -> Tensor:
    """int64 [L], the addresses of `weights`."""
    device, addresses = weights[0].device, tuple(w.data_ptr() for w in weights)
    table = _tables.get((device, addresses))
    if table is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "masm::subspace_penalty: its table of weights is made outside of CUDA graphs; run the loss once before "
                "capturing"
            )
        if len(_tables) >= _MAX_TABLES:
            _tables.pop(next(iter(_tables)))
        table = _tables[device, addresses] = torch.tensor(addresses, dtype=torch.int64, device=device)
    return table
