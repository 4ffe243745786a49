"""Selective layer masks: who learns (state.py), who chooses (policies.py), what was chosen (history.py), and the static
choice of layers before conversion (static.py).

After arXiv 2601.01041 in words (v1: masks from the learning state of each artifact subspace; v3: forgery-sensitive
layers by gradient bias-variance before the SVD); the formulas are ours.
"""

from .policies import bias_variance
from .state import LayerMasks
from .static import select_layers

__all__ = ["LayerMasks", "bias_variance", "select_layers"]
