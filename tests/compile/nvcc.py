"""Compiles csrc/cuda/*.cu for sm_80, sm_90a and sm_100a and prints the contents of each kernel as JSON.

python tests/compile/nvcc.py            # {"nvcc": version, "kernels": {"sm_90a fold: kernel<types>": contents}}
python tests/compile/nvcc.py --only masked_adamw 90a    # of one source and architecture
python tests/compile/nvcc.py --write    # writes the table of this nvcc anew
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cubin import LOCAL_MEMORY, TOOLS

REPO = Path(__file__).parents[2]
TABLE = Path(__file__).parent / "nvcc.json"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = ("80", "90a", "100a")
#: Columns of the table.
RECORDED = ("registers", "shared")
#: As CMakeLists.txt has it.
STANDARD = "17"
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
SECTION = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)
GLOBAL_ACCESS = re.compile(r"\b(LDG|STG)\.E(?:\.(?!128|64)[A-Z0-9_]+)*(?:\.(128|64))?")


def options_of(source: str) -> list[str]:
    """The options that CMakeLists.txt sets for one source."""
    pattern = r'set_source_files_properties\(([^"]*) PROPERTIES COMPILE_OPTIONS "([^"]*)"'
    settings = re.findall(pattern, (REPO / "CMakeLists.txt").read_text())
    return [option for files, options in settings if source in files.split() for option in options.split(";")]


def sources() -> list[str]:
    """The .cu files that CMakeLists.txt builds."""
    return re.findall(
        r"csrc/cuda/\w+\.cu\b", re.search(r"masm_library\(masm_cuda([^)]*)\)", (REPO / "CMakeLists.txt").read_text())[1]
    )


def version() -> str:
    out = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+), V([\d.]+)", out)[2]


def compile_one(source: str, architecture: str, folder: Path) -> dict[str, dict[str, Any]]:
    out = folder / f"{Path(source).stem}-{architecture}.cubin"
    command = [NVCC, f"-arch=sm_{architecture}", f"-std=c++{STANDARD}", "-O3", "-Werror", "all-warnings", "-cubin"]
    ran = subprocess.run([*command, *options_of(source), "-o", out, REPO / source], capture_output=True, text=True)
    if ran.returncode != 0 or ran.stderr.strip():
        raise RuntimeError(f"{source} for sm_{architecture}:\n{ran.stdout}{ran.stderr}"[-4000:])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", out], capture_output=True, text=True, check=True).stdout
    sass = subprocess.run([TOOLS / "nvdisasm", "-c", out], capture_output=True, text=True, check=True).stdout
    parts = SECTION.split(sass)
    code = dict(zip(parts[1::2], parts[2::2]))
    kernels = {}
    for name, registers, stack, shared in USAGE.findall(usage):
        accesses = GLOBAL_ACCESS.findall(code[name])
        kernel, _, types = plain(name).partition("<")
        kernels[f"sm_{architecture} {Path(source).stem}: {plain(name)}"] = {
            "kernel": kernel,
            "types": types.removesuffix(">"),
            "registers": int(registers),
            "stack": int(stack),
            "shared": int(shared),
            "spills": len(LOCAL_MEMORY.findall(code[name])),
            "loads": widths(accesses, "LDG"),
            "stores": widths(accesses, "STG"),
            "mma": len(re.findall(r"\bHMMA\.", code[name])),
        }
    return kernels


def widths(accesses: list[tuple[str, str]], instruction: str) -> dict[str, int]:
    """How many accesses of global memory move 4 bytes or less, 8 and 16."""
    found = [int(width or 32) // 8 for name, width in accesses if name == instruction]
    return {str(size): found.count(size) for size in (4, 8, 16)}


def plain(mangled: str) -> str:
    """masm::cuda::stream_linear_kernel<bf16, float, 16, 1> of _ZN4masm..., without arguments."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = (
        name.replace("masm::cuda::", "")
        .replace("void ", "", 1)
        .replace("__nv_bfloat16", "bf16")
        .replace("__half", "fp16")
    )
    depth, end = 0, len(name)
    for i, c in enumerate(name):  # up to the parenthesis that opens the arguments
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    return name[:end]


def compile_all(jobs: list[tuple[str, str]]) -> dict[str, Any]:
    """{"nvcc": version, "kernels": {name: contents}} of (source, architecture) each."""
    kernels: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for done in pool.map(lambda job: compile_one(*job, Path(folder)), jobs):
            kernels |= done
    return {"nvcc": version(), "kernels": dict(sorted(kernels.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs=2, metavar=("SOURCE", "ARCHITECTURE"), help="e.g. masked_adamw 90a")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} instead of printing")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write writes the whole table: without --only")
    wanted = tuple(arguments.only) if arguments.only else None
    jobs = [(s, a) for s in sources() for a in ARCHITECTURES if wanted in (None, (Path(s).stem, a))]
    result = compile_all(jobs)
    if arguments.write:
        from worker import write_rows

        write_rows(TABLE, result["nvcc"], result["kernels"], RECORDED)
    else:
        json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
