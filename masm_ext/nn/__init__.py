"""The layer, and groups of layers that read the same x."""

from .masm_linear import MASMLinear
from .projections import group_projections

__all__ = ["MASMLinear", "group_projections"]
