"""Runs the real launch code without a GPU: a launch compiles its kernel, for any capability, and does not start it.

The kernel is the one a GPU would get, with what Triton specialises on: alignment, and arguments that are 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from masm_ext.kernels import launch_plan, tuning
from masm_ext.kernels.launch import Tile


class StandInDriver:
    """The driver functions that Triton calls before it loads a kernel."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches the target of a device: one device per capability

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only(
    capability: int,
    every_tile: bool,
    record: Callable[[str, dict[str, Any], CompiledKernel], object],
    record_tile: Callable[[str, Tile], object],
) -> Iterator[None]:
    """Inside, launches only compile; `record(kernel, its constants and options, what was compiled)` sees each.

    Where tuning would choose among tiles all of them are compiled, or (not `every_tile`) the first;
    `record_tile(the list they are from, tile)` sees each of them.
    """
    run, choose = JITFunction.run, tuning.choose

    def compile_and_record(self, *arguments, grid, warmup, **constants):
        record(self.__name__, constants, run(self, *arguments, grid=grid, warmup=True, **constants))

    def launch_all(target, key, candidates, launch):
        for tile in candidates if every_tile else candidates[:1]:
            launch(tile)
            record_tile(key.split()[0], tile)
        return candidates[0]  # which the caller launches: compiled already

    launch_plan.forget()  # nothing is replayed, all is compiled
    driver.set_active(StandInDriver(capability))
    JITFunction.run, tuning.choose = compile_and_record, launch_all
    try:
        yield
    finally:
        JITFunction.run, tuning.choose = run, choose
