"""MASM: multi-artifact subspace fine-tuning with selective layer masks, as fused PyTorch operators.

An interpretation of arXiv 2601.01041; see docs/method.md, "The method, and what is ours".
"""

from ._version import __version__ as __version__
from .adapter import AdapterError, load_adapter, save_adapter
from .calibration import weight_gradients
from .config import MASMConfig
from .conversion_report import ConversionReport
from .convert import convert
from .info import build_info
from .losses import orthogonality_loss, regularization_loss, spectral_consistency_loss
from .masks import LayerMasks, select_layers
from .merge import merge, unmerge
from .nn import MASMLinear, group_projections
from .optim import MaskedAdamW, param_groups, scale_free_groups
from .quantization import QuantizationReport, quantize
from .recompute import recompute_inputs

__all__ = [
    "AdapterError",
    "ConversionReport",
    "LayerMasks",
    "MASMConfig",
    "MASMLinear",
    "MaskedAdamW",
    "QuantizationReport",
    "build_info",
    "convert",
    "group_projections",
    "load_adapter",
    "merge",
    "orthogonality_loss",
    "param_groups",
    "quantize",
    "recompute_inputs",
    "regularization_loss",
    "save_adapter",
    "scale_free_groups",
    "select_layers",
    "spectral_consistency_loss",
    "unmerge",
    "weight_gradients",
]
