"""Applies a method to a detector: new layers, trainable parameters, optimizer."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from masm_detect.config import ConfigError, MethodConfig
from masm_detect.models.detector import Detector

from . import registry
from .method import Calibration, Method
from .quantized import quantize_backbone


def resolve(config: MethodConfig) -> MethodConfig:
    """`config` with the default of its method in place of every null rate and rank.

    Raises:
        ConfigError: settings that the method cannot use.
    """
    method = registry.load(config.name)
    method.check(config)
    rates = method.rates
    missing = [field.name for field in fields(rates) if getattr(config, field.name) is None]
    return replace(config, **{name: getattr(rates, name) for name in missing})


def build_method(
    name: str,
    detector: Detector,
    config: MethodConfig,
    seed: int,
    *,
    calibration: Calibration | None = None,
    progress: bool = False,
) -> Method:
    """Adapt `detector` in place by the method called `name`.

    Args:
        name: a key of `registry.METHODS`; replaces `config.name`.
        seed: of the new random weights (head, LoRA's A), the same in every run.
        calibration: needed by masm with the static mask policy or with directions of the gradient.
        progress: show a bar while weights are decomposed.

    Raises:
        ConfigError: unknown name, or a rank that the layers do not have.
    """
    if name not in registry.METHODS:
        raise ConfigError(f"unknown method {name!r}; there are {', '.join(registry.METHODS)}")
    config, spec = resolve(replace(config, name=name)), registry.load(name)
    if config.masm.mask_seed is None:
        config = replace(config, masm=replace(config.masm, mask_seed=seed))
    prepare_detector(detector, config, seed, calibration, progress)
    quantization = quantize_backbone(detector, config)
    optimizer = spec.optimizer(detector, config)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return Method(
        name=name,
        optimizer=optimizer,
        penalty=spec.penalty(optimizer, config),
        masks=getattr(optimizer, "masks", None),
        trainable_parameters=sum(p.numel() for p in detector.parameters() if p.requires_grad),
        uses_masm_ext=spec.uses_masm_ext,
        quantization=quantization,
    )


def prepare_detector(
    detector: Detector,
    config: MethodConfig,
    seed: int,
    calibration: Calibration | None = None,
    progress: bool = False,
) -> None:
    """The model's half of `build_method`: new layers in place and `requires_grad` set, without an optimizer.

    `config` is resolved. The global random generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector.head.reset_parameters()
        registry.load(config.name).prepare(detector, config, calibration, progress)
