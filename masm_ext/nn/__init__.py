from .layer_group import group_projections
from .masm_linear import MASMLinear

__all__ = ["MASMLinear", "group_projections"]
