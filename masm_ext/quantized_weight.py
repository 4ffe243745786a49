"""Frozen weights of 8 bits: tensor types of torchao, which hold integers (or float8) and a scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .sharded import is_sharded, whole_tensor


def is_quantized(weight: Tensor) -> bool:
    """Whether a tensor is one of torchao's quantised types."""
    return is_traceable_wrapper_subclass(weight) and type(weight).__module__.startswith("torchao.")


def held_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors in memory behind a tensor: those of a quantised weight, or the tensor itself."""
    if not is_quantized(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names if (part := getattr(tensor, name)) is not None]


def is_made_dense(weight: Tensor) -> bool:
    """Whether :func:`dense_weight` makes a new tensor of the whole weight: if it is quantised or sharded."""
    return is_quantized(weight) or is_sharded(weight)


def dense_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of a quantised or sharded weight in ``dtype``, in new memory; of another one, the weight in ``dtype``.

    The parts of a sharded weight are gathered from all processes, so all must call this.
    """
    if is_sharded(weight):
        weight = whole_tensor(weight)
    if not is_quantized(weight):
        return weight.to(dtype)
    return weight.dequantize(output_dtype=torch.float32 if dtype == torch.float64 else dtype).to(dtype)
