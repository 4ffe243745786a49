"""masm::masked_adamw_ on CUDA without libmasm_cuda: two launches a step, and nothing waits."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from ..contract import check_masked_adamw
from . import adamw
from .launch import on_device, run

BLOCK = 1024
_KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in the order of the bits in adamw.py
#: Tables of addresses on the device, by their content: gradients mostly keep their addresses between steps.
_tables: OrderedDict[tuple, Tensor] = OrderedDict()
_TABLES = 8
#: Pinned memory for captured steps, by shape: it cannot be allocated while a CUDA graph is captured.
_spare: dict[torch.Size, list[Tensor]] = {}
_SPARES = 2
#: Pinned memory that captured graphs copy from at each replay. Kept for good: the end of a graph is not reported.
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
    1], give found = 2, and nothing is written; overlapping segments are not detected."""
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
    """int64 [T, 7] on the device: the addresses, size and type of each parameter (adamw.py, COLUMNS)."""
    penalized = [t.data_ptr() if t.numel() else 0 for t in penalties] or [0] * len(params)
    rows = tuple(
        (p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), e, p.numel(), _KINDS.index(p.dtype))
        for p, g, m, v, e in zip(params, grads, exp_avgs, exp_avg_sqs, penalized)
    )
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 7).to(device)
    host = torch.Size([len(rows), 7])
    if torch.cuda.is_current_stream_capturing():
        return _upload(rows, _spare_for_capture(host), device)
    spares = _spare.setdefault(host, [])
    while len(spares) < _SPARES:
        spares.append(_pinned(host))
    # per stream: another one would have to wait for the upload
    key = (device, torch.cuda.current_stream(device).cuda_stream, rows)
    if key in _tables:
        _tables.move_to_end(key)
        return _tables[key]
    _tables[key] = _upload(rows, _pinned(host), device)
    if len(_tables) > _TABLES:
        _tables.popitem(last=False)
    return _tables[key]


def _spare_for_capture(shape: torch.Size) -> Tensor:
    spares = _spare.get(shape)
    if not spares:
        raise RuntimeError(
            f"masm::masked_adamw_: no pinned memory is left for a captured step over {shape[0]} parameters; take one "
            f"step over them outside of a graph before each capture, and capture at most {_SPARES} steps in a graph"
        )
    _captured.append(spares.pop())
    return _captured[-1]


def _pinned(shape: torch.Size) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, pin_memory=True)


def _upload(rows: tuple, pinned: Tensor, device: torch.device) -> Tensor:
    """The copy from pinned memory does not wait."""
    pinned.copy_(torch.tensor(rows, dtype=torch.int64).reshape(pinned.shape))
    return torch.empty(pinned.shape, dtype=torch.int64, device=device).copy_(pinned, non_blocking=True)
