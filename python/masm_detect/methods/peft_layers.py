"""Hugging Face PEFT, as the methods lora, milora and osf use it."""

from __future__ import annotations

from typing import Any

from torch import nn

from masm_detect.config import ConfigError


def peft() -> Any:
    """The package peft; ConfigError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            'the methods lora, milora and osf need the package peft: pip install "masm_ext[peers]"'
        ) from error
    return peft


def inject(model: nn.Module, peft_config: Any) -> None:
    """Put PEFT's layers into `model` in place and freeze everything else.

    There is no PeftModel around it: the detector keeps its own forward.
    """
    peft().inject_adapter_in_model(peft_config, model)
