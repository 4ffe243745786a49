"""masm::subspace_linear, its group and their backward on CUDA: the launches of each strategy.

Strategies (``masm_ext.ops.strategies`` chooses among them; docs/kernels.md has their costs):

- ``kext``: a skinny pass for P, then one GEMM whose inner dimension is extended by R.
- ``single``: one GEMM that computes P beside the dense product. R <= 64.
- ``stream``: one CUDA C++ kernel that reads the weight once. M <= 64, R <= 64; needs libmasm_cuda. Forward
  only: its gradient of x is that of ``single``.
- ``addmm``: low-rank part and bias first, then cuBLAS adds the dense product in place.
- ``folded``: the weight is folded once a call, then cuBLAS.
- ``reference``: the formula in plain torch, for float64 and for comparison.

The gradient of x uses the same strategies, with Q for P. du, dv, ds and dbias do not depend on the strategy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import reference
from ..autocast import autocast_off
from ..contract import (
    check_subspace_linear,
    check_subspace_linear_backward,
    check_subspace_linear_group,
    check_subspace_linear_group_backward,
)
from ..ops.strategies import (
    ADDMM,
    COMPUTED_RANK,
    KEXT,
    MAX_LAYERS,
    MAX_RANK,
    REFERENCE,
    SINGLE,
    STRATEGIES,
    STREAM,
    STREAM_RANK,
    STREAM_ROWS,
    Call,
    choose,
)
from . import small_batch
from .launch import Target, Tile, on_device, precision, target_of
from .launch_plan import repeated
from .operands import Factor, Live, aligned, as_rows, side_by_side
from .products import forward_product, input_gradient
from .skinny_products import both_products, finish, reduce_rows, skinny_product
from .tiles import SMALL_ROWS, both_max_rank


@repeated
def subspace_linear(x, weight, u, s, v, bias, mask, offsets, need_p=True, strategy="", target=None, tile=None):
    check_subspace_linear(x, weight, u, s, v, bias, mask, offsets)
    y, p = subspace_linear_group(
        *(x, [weight], [u], [s], [v], [] if bias is None else [bias], [] if mask is None else [mask]),
        *(offsets, need_p, strategy, target, tile),
    )
    return y[0], p


@repeated
def subspace_linear_backward(
    dy, x, weight, u, s, v, p, mask, offsets, need_dx, need_du, need_ds, need_dv, need_dbias, strategy="",
    target=None, tile=None,
):  # fmt: skip
    check_subspace_linear_backward(dy, x, weight, u, s, v, p, mask, offsets)
    return subspace_linear_group_backward(
        *([dy], x, [weight], [u], [s], [v], p, [] if mask is None else [mask], offsets),
        *(need_dx, need_du, need_ds, need_dv, need_dbias, strategy, target, tile),
    )


@repeated
def subspace_linear_group(
    x: Tensor,
    weight: Sequence[Tensor],
    u: Sequence[Tensor],
    s: Sequence[Tensor],
    v: Sequence[Tensor],
    bias: Sequence[Tensor],
    mask: Sequence[Tensor],
    offsets: Sequence[int],
    need_p: bool = True,
    strategy: str = "",
    target: Target | None = None,
    tile: Tile | None = None,
) -> tuple[list[Tensor], Tensor]:
    """y J x [..., N] and p [..., J R] (no columns if not need_p). `target`, `tile`: for that GPU, with that tile."""
    op = "subspace_linear" if len(weight) == 1 else "subspace_linear_group"
    check_subspace_linear_group(x, weight, u, s, v, bias, mask, offsets)
    lead, J, (N, D), R = x.shape[:-1], len(weight), weight[0].shape, s[0].shape[0]
    with on_device(x), autocast_off(x):
        target = target_of(x.device) if target is None else target
        if not strategy and _too_many(J, R):
            layer = partial(subspace_linear, target=target, tile=tile)
            return reference.subspace_linear_group(x, weight, u, s, v, bias, mask, offsets, need_p, layer=layer)
        strategy = strategy or _choose(x, N, D, R, weight, target, need_p)
        if strategy == REFERENCE:
            return reference.subspace_linear_group(x, weight, u, s, v, bias, mask, offsets, need_p)
        _check_supported(op, x, R, J, strategy)
        if strategy == STREAM:
            rows, biases = as_rows(x), bias or J * [None]
            ps = [rows.new_empty(rows.shape[0], R, dtype=torch.float32) for _ in range(J)]
            y = [small_batch.forward(rows, *layer) for layer in zip(weight, u, s, v, biases, ps)]
            p = ps[0] if J == 1 else torch.cat(ps, 1)
        else:
            factor = Factor(side_by_side(s), side_by_side(v), side_by_side(u))
            all_bias = side_by_side(bias) if bias else None
            w = _stacked_weight(weight)
            y, p = forward_product(as_rows(x), w, factor, all_bias, J, need_p, strategy, target, tile)
    none = s[0].new_empty(*lead, 0, dtype=torch.float32)
    return [y_j.view(*lead, N) for y_j in y], p.view(*lead, J * R) if need_p else none


@repeated
def subspace_linear_group_backward(
    dy: Sequence[Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
    u: Sequence[Tensor],
    s: Sequence[Tensor],
    v: Sequence[Tensor],
    p: Tensor,
    mask: Sequence[Tensor],
    offsets: Sequence[int],
    need_dx: bool,
    need_du: bool,
    need_ds: bool,
    need_dv: bool,
    need_dbias: bool,
    strategy: str = "",
    target: Target | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx [..., D], du [J R, N], ds [J R], dv [J R, D], dbias [J N]; a gradient that is not needed has no elements."""
    op = "subspace_linear_backward" if len(weight) == 1 else "subspace_linear_group_backward"
    check_subspace_linear_group_backward(dy, x, weight, u, s, v, p, mask, offsets)
    J, (N, D), R = len(weight), weight[0].shape, s[0].shape[0]
    needs = (need_dx, need_du, need_ds, need_dv, need_dbias)
    learning = need_du or need_ds or need_dv
    with on_device(x), autocast_off(x):
        target = target_of(x.device) if target is None else target
        if not strategy and _too_many(J, R):
            layer = partial(subspace_linear_backward, target=target, tile=tile)
            return reference.subspace_linear_group_backward(
                dy, x, weight, u, s, v, p, mask, offsets, *needs, layer=layer
            )
        strategy = strategy or _choose(dy[0], D, N, R, weight, target, learning, dx=True)
        if strategy == REFERENCE:
            return reference.subspace_linear_group_backward(dy, x, weight, u, s, v, p, mask, offsets, *needs)
        strategy = SINGLE if strategy == STREAM else strategy
        _check_supported(op, x, R, J, strategy)
        dys = [as_rows(d) for d in dy]
        ps = p.reshape(dys[0].shape[0], J * R).contiguous() if need_du or need_ds else None
        xs = as_rows(x) if need_dv else dys[0][:, :0]  # no columns if only ds is needed
        factor = Factor(side_by_side(s), side_by_side(u), side_by_side(v))
        dx, *rest = _backward(dys, xs, weight, factor, ps, mask, offsets, needs, strategy, target, tile)
        return dx.view(x.shape) if need_dx else dx, *rest


def _backward(dys, xs, weight, factor, ps, mask, offsets, needs, strategy, target, tile):
    need_dx, need_du, need_ds, need_dv, need_db = needs
    J, (M, N) = len(dys), dys[0].shape
    R = factor.s.shape[0] // J
    none = weight[0].new_empty(0)
    every, each = Live.of(mask, offsets), [Live.of(mask[j : j + 1], offsets) for j in range(J)]

    # The sums over rows: du and dbias from dY, dv and ds from x. One pass over dY also gives Q if registers allow.
    need_q = need_ds or need_dv or (need_dx and strategy in (KEXT, ADDMM))
    q_from_gemm = need_dx and strategy == SINGLE
    q = dys[0].new_empty(M, J * R, dtype=torch.float32) if need_q else None
    du_sums = dv_sums = None
    if need_du and need_q and not q_from_gemm and both_max_rank(dys[0].dtype, precision(dys[0].dtype)) >= R:
        du_sums = both_products(dys, factor.v, ps, each, q, need_db, target, tile)
    else:
        if need_q and not q_from_gemm:
            for j, d in enumerate(dys):
                skinny_product(d, factor.v[j * R : (j + 1) * R], q[:, j * R : (j + 1) * R], target, tile)
        if need_du:
            du_sums = reduce_rows(dys, ps, each, target, tile, need_sum=need_db)
    dx = none
    if need_dx:
        dx = input_gradient(dys, _stacked_weight(weight), factor, q, strategy, target, tile)
    if need_dv or need_ds:
        dv_sums = reduce_rows([xs], q, [every], target, tile, p=ps if need_ds else None)

    du = torch.empty_like(factor.v) if need_du else none
    dv = torch.empty_like(factor.c) if need_dv else none
    ds = torch.empty_like(factor.s) if need_ds else none
    db = weight[0].new_empty(J * N) if need_db and need_du else none
    finish(du_sums, dv_sums, du, dv, ds, db, factor.s, every, J)
    if need_db and not need_du:
        db = torch.cat([d.sum(0, dtype=torch.float32).to(d.dtype) for d in dys])
    return dx, du, ds, dv, db


def _stacked_weight(weight: Sequence[Tensor]) -> Tensor:
    """[J N, D]. A single weight may have contiguous rows or columns."""
    w = weight[0]
    return w if len(weight) == 1 and 1 in w.stride() else side_by_side(weight)


def _choose(
    x: Tensor, OUT: int, IN: int, R: int, weight: Sequence[Tensor], target: Target, learning: bool, dx: bool = False
) -> str:
    M, tf32 = math.prod(x.shape[:-1]), precision(x.dtype) == "tf32"
    library = not dx and small_batch.available(x) and IN % small_batch.COLUMNS == 0 and aligned(*weight)
    return choose(Call(M, OUT, IN, R, len(weight), x.dtype, target.capability, learning, tf32, library, dx))


def _too_many(J: int, R: int) -> bool:
    """Whether a group exceeds one call, so that its layers run one by one."""
    return J > 1 and (J > MAX_LAYERS or J * R > MAX_RANK)


def _check_supported(op: str, x: Tensor, R: int, J: int, strategy: str) -> None:
    """Raises RuntimeError if the kernels cannot serve a call; the message names a strategy that can."""
    why, M = None, math.prod(x.shape[:-1])
    if strategy not in STRATEGIES:
        why = f"there is no strategy {strategy!r}; there are {', '.join(STRATEGIES)}"
    elif x.dtype == torch.float64:
        why = f"strategy {strategy!r} does not serve float64; 'reference' does"
    elif J * R > MAX_RANK or J > MAX_LAYERS:
        why = (
            f"{J} layers of R = {R}; strategy {strategy!r} serves R <= {MAX_RANK} together and {MAX_LAYERS} layers, "
            "'reference' any"
        )
    elif strategy == SINGLE and R > COMPUTED_RANK:
        why = f"strategy 'single' keeps P in registers and serves R <= {COMPUTED_RANK}, not {R}; use 'kext'"
    elif strategy == STREAM and not small_batch.available(x):
        why = (
            "strategy 'stream' needs libmasm_cuda, which is not loaded (masm_ext.build_info() has the reason); use "
            "'single', or build it with nvcc (docs/install.md)"
        )
    elif strategy == STREAM and (M > STREAM_ROWS or R > STREAM_RANK):
        most = f"up to {STREAM_ROWS} rows of x and R <= {STREAM_RANK}"
        why = f"strategy 'stream' serves {most}, not {M} and {R}; use 'kext'"
    elif strategy == STREAM and (x.dtype.itemsize != 2 or x.shape[-1] % small_batch.COLUMNS):
        why = f"strategy 'stream' serves half precision and inputs of a multiple of {small_batch.COLUMNS}; use 'single'"
    elif strategy == SINGLE and J > 1 and R > 16 and M > SMALL_ROWS:
        # dX holds J tiles of V beside those of x: more than the shared memory of a program
        why = f"strategy 'single' serves groups of R <= 16 beyond {SMALL_ROWS} rows, not {R}; use 'kext'"
    if why is not None:
        raise RuntimeError(f"masm::{op} on CUDA: {why}")
