"""What every launch needs: the GPU it is for, the tile it runs with, and :func:`run`, which starts every kernel.

launch_plan.py records the calls of ``run`` and replays them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Recorder(AbstractContextManager, Protocol):
    """Records launches, and as a context torch ops and allocations (launch_plan.py)."""

    def reject(self, why: str, again: bool = False) -> None: ...

    def launch(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: dict[str, Any]
    ) -> None: ...


class Target(NamedTuple):
    """The GPU to choose kernels for. capability: 10 * major + minor; processors: SMs."""

    capability: int
    processors: int
    name: str = ""


class Tile(NamedTuple):
    """Sizes of a program's tile and how it is compiled. Letters: rows, columns and inner dimension of the product."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


@lru_cache
def _properties(index: int) -> Target:
    device = torch.cuda.get_device_properties(index)
    return Target(10 * device.major + device.minor, device.multi_processor_count, device.name)


def target_of(device: torch.device) -> Target:
    """Raises RuntimeError for a GPU older than sm_80, whose tensor cores know neither bfloat16 nor tf32."""
    target = _properties(torch.cuda.current_device() if device.index is None else device.index)
    if target.capability < 80:
        raise RuntimeError(
            f"masm_ext: {target.name} has compute capability {target.capability / 10}; the Triton kernels need 8.0 "
            "(Ampere) or newer. Pass strategy='reference' to run the plain formula."
        )
    return target


def on_device(t: Tensor) -> AbstractContextManager:
    """Make the device of `t` the current one: Triton launches there."""
    if t.is_cuda and t.get_device() != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return nullcontext()


def run(kernel: triton.JITFunction, grid: tuple[int, ...], *arguments: Any, warps: int, stages: int = 1, **constants):
    """Start `kernel` on the current stream, unless the grid is empty.

    Fused multiply-add is requested explicitly: Triton 3.10 changes the default.
    """
    if not all(grid):
        return
    options = dict(**constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
    plan = recording()
    if plan is None:
        kernel[grid](*arguments, **options)
        return
    with _disable_current_modes():  # Triton's own work is not recorded
        compiled = kernel[grid](*arguments, **options)
    plan.launch(kernel, compiled, grid, arguments, options)


_recorder = threading.local()


def recording() -> Recorder | None:
    """The plan that this thread is recording, or None."""
    return getattr(_recorder, "plan", None)


@contextmanager
def record_on(plan: Recorder) -> Iterator[None]:
    """Records what this thread launches and allocates inside on `plan`."""
    _recorder.plan = plan
    try:
        with plan:
            yield
    finally:
        _recorder.plan = None


# Triton's own cdiv and next_power_of_2 take 5 us on the host, many times a call.
def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def padded(R: int) -> int:
    """R rounded up to a power of two that the tensor cores take, at least 16."""
    return max(16, next_power_of_2(R))


def precision(dtype: torch.dtype) -> str:
    """Precision of float32 products in the dense part and in skinny passes: "tf32" if torch allows it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def low_rank_precision(dtype: torch.dtype) -> str:
    """The same for (T * s) C, whose operands are float32 also beside half precision."""
    return precision(dtype) if dtype == torch.float32 else "tf32"
