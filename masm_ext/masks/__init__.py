"""Selective layer masks: statistics and current masks (state.py), policies that select (policies.py), the record of
selections (history.py), and the selection of layers before conversion (static.py).

The ideas follow the text of arXiv 2601.01041 (v1: masks from the learning state of each artifact subspace; v2, v3:
layers by gradient bias-variance before the SVD). The formulas are ours.
"""

from .policies import bias_variance
from .state import LayerMasks
from .static import select_layers

__all__ = ["LayerMasks", "bias_variance", "select_layers"]
