"""masm::masked_adamw_ on CUDA where libmasm_cuda was not built: two launches a step, and nothing waits."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from ..contract import check_masked_adamw
from . import adamw
from .launch import on_device, run

BLOCK = 1024
_KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in the order of the bits in adamw.py
#: Tables of addresses on the device, by what they hold: gradients mostly come to lie where they lay before.
_tables: OrderedDict[tuple, Tensor] = OrderedDict()
_TABLES = 8
#: Pinned memory of an earlier step, by its shape: while a CUDA graph is captured none can be allocated.
_spare: dict[torch.Size, Tensor] = {}
#: Pinned memory that the copy of a captured graph reads at each replay.
_captured: list[Tensor] = []


def masked_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    penalties: list[Tensor],
    steps: Tensor,
    mask: Tensor,
    segments: Tensor,
    hyper: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`masm_ext.reference.masked_adamw_`. Segments outside their tensor or the blocks, and masks outside [0,
    1], give found = 2, and nothing is written; segments that overlap are not noticed."""
    check_masked_adamw(
        params, grads, exp_avgs, exp_avg_sqs, penalties, steps, mask, segments, hyper, grad_scale, found_inf
    )
    T, S, B = len(params), len(segments), len(mask)
    with on_device(mask):
        table = _table(params, grads, exp_avgs, exp_avg_sqs, penalties, mask.device)
        control = torch.zeros(1 + 4 * B, dtype=torch.int32, device=mask.device)
        power, signal = hyper.new_empty(S), hyper.new_empty(S)
        stats, found = hyper.new_zeros(B, 2), mask.new_empty(1)
        types = sum(1 << kind for kind in {_KINDS.index(p.dtype) for p in params})
        grid = (max(S, 1),)
        constants = dict(HAS_SCALE=grad_scale is not None, TYPES=types, BLOCK=BLOCK, warps=4)
        operands = (table, segments, mask, grad_scale, found_inf, power, control, T, S, B)
        run(adamw.inspect_gradients, grid, *operands, HAS_FOUND=found_inf is not None, **constants)
        operands = (table, segments, mask, hyper, steps, grad_scale, power, signal, stats, found, control, T, S, B)
        run(adamw.update_segments, grid, *operands, **constants)
    return stats, found


def _table(params, grads, exp_avgs, exp_avg_sqs, penalties, device: torch.device) -> Tensor:
    """int64 [T, 7] on the device: where the tensors of each parameter lie, its size and type (adamw.py, COLUMNS)."""
    penalized = [t.data_ptr() if t.numel() else 0 for t in penalties] or [0] * len(params)
    rows = tuple(
        (p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), e, p.numel(), _KINDS.index(p.dtype))
        for p, g, m, v, e in zip(params, grads, exp_avgs, exp_avg_sqs, penalized)
    )
    on_gpu, shape = device.type == "cuda", torch.Size((len(rows), 7))
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    if on_gpu and not capturing and shape not in _spare:  # a capture takes it away
        _spare[shape] = torch.empty(shape, dtype=torch.int64, pin_memory=True)
    key = (device, rows)
    if key in _tables and not capturing:
        _tables.move_to_end(key)
        return _tables[key]
    host = torch.tensor(rows, dtype=torch.int64).reshape(shape)
    if not on_gpu:
        return host.to(device)
    if capturing:
        pinned = _spare.pop(shape, None)
        if pinned is None:
            raise RuntimeError(
                "masm::masked_adamw_: a step over these parameters is captured that was not taken before; take one "
                "step outside the graph first"
            )
        _captured.append(pinned.copy_(host))
        return torch.empty_like(host, device=device).copy_(pinned, non_blocking=True)
    table = host.pin_memory().to(device, non_blocking=True)  # the copy from pinned memory does not wait
    _tables[key] = table
    if len(_tables) > _TABLES:
        _tables.popitem(last=False)
    return table
