"""The table (op, device) -> implementation, and the registration of the implementations in Python.

An op has exactly one implementation on a device, in the file that the table names; there is no silent fallback, and
PyTorch's dispatcher refuses other devices. C++ and CUDA implementations register themselves when their library loads.
Triton files are registered here and imported at their first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from .. import _library

CPP = "C++"
CUDA = "CUDA"
TRITON = "Triton"
LAYERS = "masm::subspace_linear, layer by layer"

#: (op, device) -> (kind, file in the repository).
IMPLEMENTATIONS: dict[tuple[str, str], tuple[str, str]] = {
    ("subspace_linear", "cpu"): (CPP, "csrc/cpu/subspace_linear.cpp"),
    ("subspace_linear_backward", "cpu"): (CPP, "csrc/cpu/subspace_linear.cpp"),
    # layer by layer: reading x once saves a CPU little
    ("subspace_linear_group", "cpu"): (LAYERS, "masm_ext/ops/subspace_linear_group.py"),
    ("subspace_linear_group_backward", "cpu"): (LAYERS, "masm_ext/ops/subspace_linear_group.py"),
    ("subspace_penalty", "cpu"): (CPP, "csrc/cpu/subspace_penalty.cpp"),
    ("masked_adamw_", "cpu"): (CPP, "csrc/cpu/masked_adamw.cpp"),
    ("update_masks_", "cpu"): (CPP, "csrc/cpu/update_masks.cpp"),
    ("fold", "cpu"): (CPP, "csrc/cpu/fold.cpp"),
    ("subspace_linear", "cuda"): (TRITON, "masm_ext/kernels/subspace_linear.py"),
    ("subspace_linear_backward", "cuda"): (TRITON, "masm_ext/kernels/subspace_linear.py"),
    ("subspace_linear_group", "cuda"): (TRITON, "masm_ext/kernels/subspace_linear.py"),
    ("subspace_linear_group_backward", "cuda"): (TRITON, "masm_ext/kernels/subspace_linear.py"),
    ("subspace_penalty", "cuda"): (TRITON, "masm_ext/kernels/subspace_penalty.py"),
    ("masked_adamw_", "cuda"): (CUDA, "csrc/cuda/masked_adamw.cu")
    if _library.CUDA_LIBRARY is not None
    else (TRITON, "masm_ext/kernels/masked_adamw.py"),
    ("update_masks_", "cuda"): (CUDA, "csrc/cuda/update_masks.cu")
    if _library.CUDA_LIBRARY is not None
    else (TRITON, "masm_ext/kernels/update_masks.py"),
    ("fold", "cuda"): (TRITON, "masm_ext/kernels/fold.py"),
}


def _imported_at_call(op: str, file: str) -> Callable[..., Any]:
    """A function that calls ``op`` of a Triton file; the file is imported at the first call."""

    def call(*arguments: Any) -> Any:
        try:
            module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        except ImportError as error:
            raise ImportError(
                f"masm_ext: masm::{op} is served by Triton on CUDA, and Triton cannot be imported ({error}); "
                "pip install triton, or install torch from a CUDA wheel, which brings it"
            ) from error
        return getattr(module, op)(*arguments)

    return call


for (_op, _device), (_kind, _file) in IMPLEMENTATIONS.items():
    if _kind == TRITON:
        torch.library.impl(f"masm::{_op}", _device, _imported_at_call(_op, _file))
