"""The formulas in plain torch: the oracle of the tests and the eager baseline of the benchmarks.

float32 and float64 inputs are computed in their own type; half-precision inputs are widened to float32 and the result
is rounded once.
"""

from .fold import fold
from .masked_adamw import masked_adamw_
from .subspace_linear import (
    subspace_linear,
    subspace_linear_backward,
    subspace_linear_group,
    subspace_linear_group_backward,
)
from .subspace_penalty import subspace_penalty
from .update_masks import (
    choose_layers,
    force_masks_,
    settle_masks_,
    snr_of,
    update_masks_,
    update_statistics_,
)

__all__ = [
    "choose_layers",
    "fold",
    "force_masks_",
    "masked_adamw_",
    "settle_masks_",
    "snr_of",
    "subspace_linear",
    "subspace_linear_backward",
    "subspace_linear_group",
    "subspace_linear_group_backward",
    "subspace_penalty",
    "update_masks_",
    "update_statistics_",
]
