"""masm::subspace_penalty on CUDA: one launch for the values and one for the gradients read all weights of a shape.

More than MAX_ROWS directions, or more layers than WORKSPACE allows, take further launches. The rest of the formula
works on [R, R], [R, N] and [R, D] matrices, stacked over the layers of a shape, in plain torch
(``masm_ext.reference.subspace_penalty``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference.subspace_penalty import weight_products as plain_products
from . import skinny
from .launch import Target, Tile, cdiv, on_device, padded, run, target_of
from .skinny_products import chunk_rows_of
from .tiles import PENALTY, tiles

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
#: Rows of the factors per reading of the weights: more do not fit in registers as three parts.
MAX_ROWS = 32
#: Bytes of the parts of b weight^T that are alive at once; more layers are taken in several launches.
WORKSPACE = 64 << 20
#: Tables of addresses on the GPU, by their content: a training step copies none. Never dropped: a captured graph may
#: read one. 8 bytes a weight, one table for each set of weights.
_tables: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}


def subspace_penalty(*arguments):
    """As ``masm_ext.reference.subspace_penalty``. float64 has no kernel and uses plain products."""
    device = arguments[0][0].device
    with on_device(arguments[0][0]):
        products = partial(weight_products, target=target_of(device))
        return reference.subspace_penalty(*arguments, products=products)


def weight_products(
    weights: Sequence[Tensor], a: Tensor, b: Tensor, target: Target, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """``a weight`` [L, R, D] and ``b weight^T`` [L, R, N] in float32, each weight [N, D] read once for up to 32 rows.

    a [L, R, N], b [L, R, D] float32. Products in three tf32 parts ("tf32x3"), as exact as float32.
    """
    if a.dtype == torch.float64:
        return plain_products(weights, a, b)
    (L, R, D), N = b.shape, weights[0].shape[0]
    weights = [w if _in_place(w) else w.clone(memory_format=torch.contiguous_format) for w in weights]
    tile = tiles(PENALTY, target, torch.float32, "tf32")[0] if tile is None else tile
    together = max(1, WORKSPACE // (4 * MAX_ROWS * max(1, cdiv(D, tile.BN)) * max(N, 1)))
    a_weight, b_weight = torch.empty_like(b), torch.empty_like(a)
    for first in range(0, L, together):
        layers = slice(first, min(L, first + together))
        table = _table(weights[layers])
        for begin in range(0, R, MAX_ROWS):
            rows = slice(begin, min(R, begin + MAX_ROWS))
            parts = (a[layers, rows].contiguous(), b[layers, rows].contiguous())
            _products(table, weights[0], *parts, a_weight[layers, rows], b_weight[layers, rows], target, tile)
    return a_weight, b_weight


def _products(table, like, a, b, a_weight, b_weight, target, tile) -> None:
    """Of the weights in `table`, all like `like` [N, D]: a weight and b weight^T, for at most MAX_ROWS rows."""
    (L, R, D), N = b.shape, like.shape[0]
    tiles_d = cdiv(D, tile.BN)
    rows = chunk_rows_of(N, tile.BM, tiles_d * L, target)
    chunks = cdiv(N, rows)
    out = b.new_empty(L, tiles_d, N, R), b.new_empty(L, chunks, R, D)
    constants = dict(TABLE=True, DTYPE=_TYPES[like.dtype], OFFSETS=None, HAS_MASK=False, HAS_SUM=False)
    sizes = dict(BM=tile.BM, BW=tile.BN, BR=padded(R), warps=tile.warps, stages=tile.stages)
    # a [R, N] is T [N, R] transposed: its row stride is 1
    operands = (table, b, a, *out, None, None, N, D, R, D, 1, N, R, 0, rows)
    run(skinny.skinny_both, (tiles_d, chunks, L), *operands, **constants, **sizes, PRECISION="tf32x3")
    b_weight.copy_(out[0].sum(1).mT)
    a_weight.copy_(out[1].sum(1))


def _in_place(w: Tensor) -> bool:
    return w.is_contiguous() and w.data_ptr() % 16 == 0


def _table(weights: Sequence[Tensor]) -> Tensor:
    """int64 [L], the addresses of `weights`."""
    device, addresses = weights[0].device, tuple(w.data_ptr() for w in weights)
    table = _tables.get((device, addresses))
    if table is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # by fills: a graph cannot copy from the host; and not cached: the memory belongs to the graph
            table = torch.empty(len(addresses), dtype=torch.int64, device=device)
            for i, address in enumerate(addresses):
                table[i] = address
            return table
        table = torch.tensor(addresses, dtype=torch.int64).to(device)
        _tables[device, addresses] = table
    return table
