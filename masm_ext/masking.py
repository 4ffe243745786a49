"""The former place of :mod:`masm_ext.masks`, kept for scripts that import it."""

from .masks import LayerMasks, bias_variance, select_layers

__all__ = ["LayerMasks", "bias_variance", "select_layers"]
