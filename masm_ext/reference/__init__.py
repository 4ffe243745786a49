"""The formulas in plain torch: the one oracle of the tests and the eager line of the benchmarks.

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

__all__ = [
    "fold",
    "masked_adamw_",
    "subspace_linear",
    "subspace_linear_backward",
    "subspace_linear_group",
    "subspace_linear_group_backward",
    "subspace_penalty",
]
