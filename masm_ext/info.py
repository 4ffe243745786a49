"""Versions, and the file that implements each op."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _library
from ._version import __version__
from .ops.dispatch import IMPLEMENTATIONS


def build_info() -> dict[str, Any]:
    """Versions, and the file that implements each op on each device. Does not initialize CUDA.

    Returns:
        Plain JSON types under masm_ext, python, torch, torch_cuda (the CUDA version torch was built with, or None),
        cpu_capability, libraries (name -> "loaded" or the reason why not) and ops (op -> device -> "kind: file").
    """
    if _library.CUDA_LIBRARY is not None:
        cuda = "loaded"
    elif _library.CUDA_BUILT:
        cuda = "built, not loaded: this torch is a CPU build"
    else:
        cuda = "not built (see docs/install.md)"
    ops: dict[str, dict[str, str]] = {}
    for (op, device), (kind, file) in sorted(IMPLEMENTATIONS.items()):
        ops.setdefault(f"masm::{op}", {})[device] = f"{kind}: {file}"
    return {
        "masm_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "libraries": {"libmasm_cpu": "loaded", "libmasm_cuda": cuda},
        "ops": ops,
    }
