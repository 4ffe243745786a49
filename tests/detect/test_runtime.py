"""The settings of torch that a run makes, and that they end with it."""

from __future__ import annotations

import torch
from masm_detect.config import RuntimeConfig
from masm_detect.runtime import process_settings


def test_deterministic_without_filling_memory():
    with process_settings(RuntimeConfig()):
        assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
