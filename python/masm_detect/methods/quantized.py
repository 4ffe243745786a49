"""Frozen weights of a detector in 8 bits (`method.quantize`)."""

from __future__ import annotations

from masm_detect.config import ConfigError, MethodConfig
from masm_detect.models.detector import Detector
from masm_ext import QuantizationReport, quantize


def quantize_backbone(detector: Detector, config: MethodConfig) -> QuantizationReport | None:
    """Keep the frozen linear layers of the backbone in the format `config.quantize`, in place; None: nothing to do.

    Raises:
        ConfigError: torchao is not installed.
    """
    if config.quantize is None:
        return None
    try:
        # the head learns; in a loaded detector its weight may be frozen
        return quantize(detector, config.quantize, include=lambda name, _: name.startswith("backbone."))
    except ImportError as error:
        raise ConfigError(f"method.quantize: {error}") from error
