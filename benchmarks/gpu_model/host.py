"""What a call on CUDA costs the host, measured without a GPU: all that Python does for it.

    python benchmarks/gpu_model/host.py
    python benchmarks/gpu_model/host.py --seconds 20 --out host.json

The real launch code runs on CPU tensors: kernels are compiled for an H100, but a stand-in for the driver does not start
them. The layers are so small that the peers' CPU operators spend less time on computing than on the call. Not included:
the time in Triton's C launcher (which also encodes TMA descriptors) and in the driver, a few us each per launch. An
eager model on a GPU waits for the host wherever the kernels of a layer take less than the time measured here.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))  # the timer, the shapes and the providers

import torch
from bench import Call, interleave, statistics
from machine import describe
from masm_detect.results import write_json
from providers import PROVIDERS, Setting
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from masm_ext.kernels import launch_plan, tuning
from masm_ext.kernels.launch import Target
from masm_ext.nn import MASMLinear
from masm_ext.ops import subspace_linear as linear
from masm_ext.ops.dispatch import IMPLEMENTATIONS, TRITON
from masm_ext.ops.strategies import KEXT, SINGLE

H100 = Target(90, 132, "NVIDIA H100")
CPU = torch.device("cpu")
#: What torch says, once a process, when a kernel is put in the place of another; here that is meant.
OVERRIDING = r"Warning only once for all operators,\s+other operators .*\s+Overriding a previously registered kernel"
#: Rows of x (more than `single`'s and `stream`'s small forms serve), width, directions.
M, WIDTH, R = 80, 64, 16
PEERS = ("effort", "peft-lora")
#: Ends the name of a call that is never replayed.
PLANNED = ", planned anew"


class StandInUtils:
    """What Triton asks of the driver when it loads a kernel, and (`started`) sees of a launch."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads of a block

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": H100.processors}


class StandInDriver:
    """Compiles for an H100 and starts nothing. `started`, if it is a list, notes every launch as (kernel, grid,
    arguments)."""

    def __init__(self) -> None:
        self.utils = StandInUtils()
        self.started: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] | None = None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", H100.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
            if self.started is not None:
                self.started.append((metadata.name, (x, y, z), rest[3:]))

        return launch


@contextmanager
def cuda_on_the_cpu() -> Iterator[StandInDriver]:
    """CPU tensors are served by the CUDA ops in Triton, whose kernels do not start. For a process of its own: what
    Triton has seen of a driver it keeps."""
    stand_in = StandInDriver()
    driver.set_active(stand_in)
    library = torch.library.Library("masm", "IMPL")
    for (op, device), (kind, file) in IMPLEMENTATIONS.items():
        if device == "cuda" and kind == TRITON:
            module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", OVERRIDING, UserWarning)
                library.impl(op, getattr(module, op), "CPU", allow_override=True)
            module.target_of = lambda device: H100
    tuning.choose = lambda target, key, candidates, launch, folder=None: candidates[0]
    try:
        yield stand_in
    finally:
        library._destroy()


class Forced(nn.Module):
    """A MASMLinear by one strategy."""

    def __init__(self, layer: MASMLinear, strategy: str) -> None:
        super().__init__()
        self.layer, self.strategy = layer, strategy

    def forward(self, x: Tensor) -> Tensor:
        factors = (self.layer.principal, self.layer.u, self.layer.s, self.layer.v, self.layer.bias)
        return linear(x, *factors, offsets=self.layer.offsets, mask=self.layer.mask, strategy=self.strategy)


def layers() -> dict[str, nn.Module]:
    """What is compared, by name; the baseline first."""

    def adapted(name: str) -> nn.Module:
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(torch.bfloat16)
        PROVIDERS[name].adapt(model, ["0"], Setting(R, 4))
        return model

    def group() -> nn.Module:
        owner = Each(nn.Sequential(*(adapted("masm")[0] for _ in range(3))))
        MASMLinear.group(list(owner.layers), owner)
        for name in ("principal", "u", "s", "v", "bias", "mask"):  # where they lie on CUDA
            tensors = [getattr(layer, name) for layer in owner.layers]
            for t, part in zip(tensors, torch.stack([t.detach() for t in tensors]).unbind(0)):
                t.data = part
        return owner

    masm = adapted("masm")[0]
    out: dict[str, nn.Module] = {"frozen": adapted("frozen")}
    for strategy in (SINGLE, KEXT):
        out[f"masm-{strategy}"] = Forced(masm, strategy)
        out[f"masm-{strategy}{PLANNED}"] = out[f"masm-{strategy}"]
    out |= {name: adapted(name) for name in PEERS}
    out["frozen, three"] = Each(nn.Sequential(*(adapted("frozen")[0] for _ in range(3))))
    out["masm-group, three"] = group()
    return out


class Each(nn.Module):
    """Layers that read the same x."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def measure(seconds: float, progress: bool) -> dict[str, dict[str, Any]]:
    """{"forward", "forward+backward"} -> {name: statistics in seconds, ratio over the frozen layer}."""
    x = torch.randn(M, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    table: dict[str, dict[str, Any]] = {}
    modules = layers()
    for what, backward in (("forward", False), ("forward+backward", True)):

        def run(name: str, backward: bool = backward) -> None:
            plans = launch_plan._plans
            if name.endswith(PLANNED):
                launch_plan._plans = {}
            try:
                y = modules[name](x)
                if backward:
                    ys = y if isinstance(y, list) else [y]
                    torch.autograd.backward(ys, [t.detach() for t in ys])
            finally:
                launch_plan._plans = plans

        calls = {name: Call(lambda name=name: run(name)) for name in modules}
        samples = interleave(calls, CPU, seconds / 2, warm_up=4, progress=what if progress else "")
        table[what] = statistics(samples, "frozen")
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="time budget (default 20)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, too")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with cuda_on_the_cpu():
        table = measure(asked.seconds, sys.stderr.isatty())
    print(f"us of the host, median [p20, p80]; bfloat16, R = {R}; no GPU, what the driver adds is not in it\n")
    print("| | " + " | ".join(table) + " |\n|---|" + "---|" * len(table))
    for name in next(iter(table.values())):
        cells = [f"{e['median'] * 1e6:.0f} [{e['p20'] * 1e6:.0f}, {e['p80'] * 1e6:.0f}]" for e in
                 (rows[name] for rows in table.values())]  # fmt: skip
        print(f"| {name} | " + " | ".join(cells) + " |")
    if asked.out is not None:
        shape = {"M": M, "N": WIDTH, "D": WIDTH, "R": R}
        write_json(asked.out, {"launch": describe(CPU), "shape": shape, "seconds": table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
