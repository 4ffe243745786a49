"""Frozen weights of 8 bits: tensor types of torchao, which hold integers (or float8) and a scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_quantized(weight: Tensor) -> bool:
    """Whether a tensor is one of torchao's quantised types."""
    return is_traceable_wrapper_subclass(weight) and type(weight).__module__.startswith("torchao.")


def dense_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of a quantised weight in ``dtype``, in new memory; of any other weight, the weight in ``dtype``."""
    if not is_quantized(weight):
        return weight.to(dtype)
    return weight.dequantize(output_dtype=torch.float32 if dtype == torch.float64 else dtype).to(dtype)
