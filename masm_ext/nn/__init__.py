from .masm_linear import MASMLinear

__all__ = ["MASMLinear"]
