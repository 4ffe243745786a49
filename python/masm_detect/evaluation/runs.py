"""Trained runs: a folder written by `masm train` in, a detector that scores out."""

from __future__ import annotations

from pathlib import Path

import torch

from masm_detect.config import ConfigError, TrainConfig
from masm_detect.config_files import load_config
from masm_detect.methods.adapters import load_method
from masm_detect.models.detector import Detector, new_detector
from masm_detect.runtime import choose_attention


def load_run(folder: Path | str, device: torch.device | str = "cpu") -> tuple[TrainConfig, Detector]:
    """The configuration and the trained detector of a run folder written by `masm train`.

    Args:
        folder: the run folder.
        device: where the detector is put.

    Raises:
        ConfigError: the folder holds no run, or one that is not finished.
    """
    folder = Path(folder)
    config = load_config(folder / "config.yaml")
    if not (folder / "adapter").is_dir():
        raise ConfigError(f"{folder} has no adapter/: its training has not ended (continue it with --resume)")
    detector = new_detector(config.model)
    load_method(detector, config.method, folder / "adapter")
    choose_attention(detector.backbone, torch.device(device))
    return config, detector.to(device)
