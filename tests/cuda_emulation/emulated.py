"""Builds the kernels of csrc/cuda for the CPU and calls them. See emulate.h for what the emulation shows."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
#: Another copy of csrc, and flags: for mutate.py and test_sanitized.py.
SOURCES = Path(os.environ.get("MASM_EMULATED_SOURCES", HERE.parents[1] / "csrc"))
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = SANITIZE if os.environ.get("MASM_EMULATED_SANITIZED") == "1" else []
#: As csrc/cuda/dtype.h numbers them.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def build(stem: str, folder: Path) -> ctypes.CDLL:
    """tests/cuda_emulation/<stem>.cpp as a library. Its functions return null, or an error message."""
    out = folder / f"{stem}.so"
    optimize = ["-O1", "-g"] if FLAGS else ["-O2"]
    # rounded like the CUDA kernels that share their maths with the CPU: no fused multiply-add
    options = ["-std=c++20", *optimize, "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC"]
    include = [f"-I{HERE}", f"-I{SOURCES / 'cuda'}", f"-I{SOURCES}"]
    command = [COMPILER, *options, *FLAGS, *include, "-shared", str(HERE / f"{stem}.cpp"), "-o", str(out)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        raise RuntimeError(f"{stem}.cpp does not build:\n{built.stderr[-4000:]}")
    return ctypes.CDLL(str(out))


def call(function: ctypes._CFuncPtr, *arguments: Tensor | int | float | None) -> None:
    """Tensors are passed as their address, None as null, numbers as int64 or double. Raises RuntimeError with the
    error of the kernel."""
    kinds = {int: ctypes.c_int64, float: ctypes.c_double, type(None): ctypes.c_void_p}
    function.restype = ctypes.c_char_p
    error = function(
        *(
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else kinds[type(a)](a)  # bool is refused
            for a in arguments
        )
    )
    if error is not None:
        raise RuntimeError(error.decode())
