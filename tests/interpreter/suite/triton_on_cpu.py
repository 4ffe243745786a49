"""Lets Triton serve CPU tensors in this process: PyTorch sees of the kernels what it sees on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from inputs import TMA

from masm_ext.kernels import fold, masked_adamw, subspace_linear, subspace_penalty, update_masks
from masm_ext.ops.dispatch import IMPLEMENTATIONS, TRITON

MODULES = {
    "subspace_linear": subspace_linear,
    "subspace_linear_backward": subspace_linear,
    "subspace_linear_group": subspace_linear,
    "subspace_linear_group_backward": subspace_linear,
    "subspace_penalty": subspace_penalty,
    "fold": fold,
    "masked_adamw_": masked_adamw,
    "update_masks_": update_masks,
}


@contextmanager
def triton_serves_the_cpu() -> Iterator[None]:
    assert set(MODULES) >= {
        op for (op, device), (kind, _) in IMPLEMENTATIONS.items() if device == "cuda" and kind == TRITON
    }
    library = torch.library.Library("masm", "IMPL")
    for op, module in MODULES.items():
        library.impl(op, getattr(module, op), "CPU", allow_override=True)
    with pytest.MonkeyPatch.context() as patch:
        for module in {fold, subspace_linear, subspace_penalty}:
            patch.setattr(module, "target_of", lambda device: TMA)
        yield
    library._destroy()
