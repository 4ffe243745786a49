"""Public functions over ``torch.ops.masm``, with their fake kernels and autograd rules."""

from . import dispatch  # registers the Python implementations of the ops
from .fold import fold
from .masked_adamw import masked_adamw_
from .quantized import quantized_linear, quantized_subspace_linear
from .subspace_linear import subspace_linear
from .subspace_linear_group import subspace_linear_group
from .subspace_penalty import subspace_penalty
from .update_masks import update_masks_

__all__ = [
    "dispatch",
    "fold",
    "masked_adamw_",
    "quantized_linear",
    "quantized_subspace_linear",
    "subspace_linear",
    "subspace_linear_group",
    "subspace_penalty",
    "update_masks_",
]
