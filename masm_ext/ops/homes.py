"""The one table (op, device) -> home. An op has exactly one home on a device; nothing falls back in silence.

A home is the file that serves the op there. C++ and CUDA homes register themselves when their library is loaded;
Python homes are registered here. A device that is not in the table is refused by PyTorch's dispatcher.
"""

from __future__ import annotations

import torch

from .. import _library, reference

CPP = "C++"
CUDA = "CUDA"
EAGER = "eager torch"  # the reference formulas: correct, not fast

HOMES: dict[tuple[str, str], tuple[str, str]] = {
    ("subspace_linear", "cpu"): (CPP, "csrc/cpu/subspace_linear.cpp"),
    ("subspace_linear_backward", "cpu"): (CPP, "csrc/cpu/subspace_linear.cpp"),
    ("subspace_penalty", "cpu"): (CPP, "csrc/cpu/subspace_penalty.cpp"),
    ("masked_adamw_", "cpu"): (CPP, "csrc/cpu/masked_adamw.cpp"),
    ("fold", "cpu"): (CPP, "csrc/cpu/fold.cpp"),
    ("subspace_linear", "cuda"): (EAGER, "masm_ext/reference/subspace_linear.py"),
    ("subspace_linear_backward", "cuda"): (EAGER, "masm_ext/reference/subspace_linear.py"),
    ("subspace_penalty", "cuda"): (EAGER, "masm_ext/reference/subspace_penalty.py"),
    ("masked_adamw_", "cuda"): (EAGER, "masm_ext/reference/masked_adamw.py"),
    # Without the CUDA library (built only beside nvcc) fold too is served by its formula on CUDA tensors.
    ("fold", "cuda"): (CUDA, "csrc/cuda/fold.cu")
    if _library.CUDA_LIBRARY is not None
    else (EAGER, "masm_ext/reference/fold.py"),
}

for (_op, _device), (_kind, _file) in HOMES.items():
    if _kind == EAGER:
        torch.library.impl(f"masm::{_op}", _device, getattr(reference, _op))
