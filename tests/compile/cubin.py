"""Contents of a compiled kernel, from its PTX and, with the tools that come with Triton, from its cubin."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.compiler import CompiledKernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b")
MMA = (
    re.compile(r"\b(wgmma)\.mma_async\.sync\.aligned\.m\d+n\d+(k\d+)\.f32\.(\w+)"),
    re.compile(r"\b(mma)\.sync\.aligned\.m\d+n\d+(k\d+)\.row\.col\.f32\.(\w+)"),
    re.compile(r"\b(tcgen05)\.mma\.cta_group::1\.(kind)::(\w+)"),
)
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)")
WAIT = re.compile(r"\bttng\.warp_group_dot_wait\b.*\bpendings = (\d+)")
LOAD = re.compile(r"\bld\.global(?:\.[\w:]+)*?\.v(\d)\.b(\d+)")


def contents(kernel: CompiledKernel) -> dict[str, Any]:
    """registers of a thread; bytes of stack, number of loads and stores of local memory (spills), bytes of shared and
    columns of tensor memory; ``mma``: the kinds of matrix products, like "wgmma k16 bf16"; ``widest``: most bytes that
    a thread moves from global memory at once; ``tma``: whether tiles are moved by hardware; ``loops``: of each loop
    with ``wgmma``, in their order, how many products at least are still under way when it waits for some.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        registers, stack = map(int, USAGE.search(_tool("cuobjdump", "-res-usage", file.name)).groups())
        sass = _tool("nvdisasm", "-c", file.name)
    ptx = kernel.asm["ptx"]
    copies = [int(size, 0) for size in COPY.findall(ptx)]
    loads = [int(count) * int(bits) // 8 for count, bits in LOAD.findall(ptx)]
    return {
        "registers": registers,
        "stack": stack,
        "spills": len(LOCAL_MEMORY.findall(sass)),
        "shared": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        "mma": sorted({" ".join(found) for pattern in MMA for found in pattern.findall(ptx)}),
        "widest": max(copies + loads, default=0),
        "tma": "cp.async.bulk.tensor" in ptx,
        "loops": loops(kernel.asm["ttgir"]),
    }


def loops(ttgir: str) -> list[int]:
    """The least number of pending products of the waits inside each scf.for that has some; nested ones count apart."""
    found: list[list[int]] = []
    inside: list[tuple[int, int]] = []  # (indentation, place in `found`) of the loops around a line
    for line in ttgir.splitlines():
        indentation = len(line) - len(line.lstrip())
        if inside and line.lstrip().startswith("}") and indentation == inside[-1][0]:
            inside.pop()
        if "scf.for " in line:
            inside.append((indentation, len(found)))
            found.append([])
        elif inside and (wait := WAIT.search(line)):
            found[inside[-1][1]].append(int(wait[1]))
    return [min(waits) for waits in found if waits]


def _tool(name: str, *arguments: str) -> str:
    ran = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(f"{name}: {ran.stderr}")
    return ran.stdout
