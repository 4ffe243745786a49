"""NVIDIA GPUs as their data sheets describe them."""

from __future__ import annotations

from dataclasses import dataclass

try:
    from masm_ext.kernels.launch import Target
except ImportError as error:
    raise ImportError(
        f"benchmarks/gpu_model reads the tiles of the Triton kernels: pip install triton ({error})"
    ) from error


@dataclass(frozen=True)
class Gpu:
    """From the data sheet of the SXM board, without sparsity: Hz, FLOP/s by kind of product, bytes/s, bytes of L2.
    `l2_speed`, bytes/s, is an estimate: no data sheet has it."""

    name: str
    capability: int
    processors: int
    clock: float
    half: float
    tf32: float
    ieee: float
    memory: float
    l2: float
    l2_speed: float

    @property
    def target(self) -> Target:
        return Target(self.capability, self.processors, self.name)

    @property
    def narrow(self) -> int:
        """Columns below which a product gets no faster: its other operand comes from shared memory at 128 bytes a
        cycle, as long as the tensor cores work on so many."""
        return round(self.half / (self.processors * self.clock * 128))


GPUS = {
    "a100": Gpu("A100", 80, 108, 1.41e9, 312e12, 156e12, 19.5e12, 2.04e12, 40e6, 4.5e12),
    "h100": Gpu("H100", 90, 132, 1.83e9, 989e12, 494e12, 67e12, 3.35e12, 50e6, 5.5e12),
    "h200": Gpu("H200", 90, 132, 1.83e9, 989e12, 494e12, 67e12, 4.8e12, 50e6, 5.5e12),
    "b200": Gpu("B200", 100, 148, 1.85e9, 2250e12, 1125e12, 75e12, 8.0e12, 126e6, 10e12),
}
