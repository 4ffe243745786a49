"""MASM: K artifact subspaces in each target layer; penalties and layer masks are off by default (docs/method.md).

`masm-nomask` never has masks. Layers, masks and optimizer are those of `masm_ext`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from itertools import islice
from typing import Any

from torch import Tensor

from masm_detect.config import ConfigError, MethodConfig
from masm_detect.models.detector import Detector
from masm_ext import (
    LayerMasks,
    MaskedAdamW,
    MASMConfig,
    convert,
    scale_free_groups,
    select_layers,
    weight_gradients,
)

from .fitted_head import fitted_head
from .method import Calibration, MethodSpec, Rates


class Masm(MethodSpec):
    """Trains the artifact subspaces of the target layers, if asked under layer masks, and the head."""

    rates = Rates(lr=3.5e-2, u_lr_scale=None, v_lr_scale=0.5, head_lr=1e-3)
    uses_masm_ext = True

    def check(self, config: MethodConfig) -> None:
        try:
            MASMConfig(**_options(config))
        except ValueError as error:
            # masm_ext names the field, what arrived and what is allowed.
            raise ConfigError(str(error)) from error
        if config.name == "masm" and config.masm.mask_policy == "none":
            _refuse_settings_of_masks(config)
        if config.masm.lift and (config.masm.orthogonality or config.masm.spectral_consistency):
            raise ConfigError(
                f"method.masm.lift is {config.masm.lift}: it needs method.masm.orthogonality and "
                "method.masm.spectral_consistency of 0"
            )

    def settings(self, detector: Detector, config: MethodConfig) -> MASMConfig:
        """The settings of `masm_ext` for this run."""
        targets = list(detector.backbone.attention_targets)
        if config.targets == "attention+mlp":
            targets += detector.backbone.mlp_targets
        return MASMConfig(target_modules=targets, modules_to_save=("head",), **_options(config))

    def prepare(
        self, detector: Detector, config: MethodConfig, calibration: Calibration | None = None, progress: bool = False
    ) -> None:
        try:
            settings = self.settings(detector, config)
            selected = gradients = None
            if calibration is None and (settings.mask_policy == "static" or settings.needs_gradients):
                raise ConfigError(
                    "mask_policy 'static' and directions 'gradient' need calibration batches; pass calibration="
                )
            if settings.mask_policy == "static":
                selected = select_layers(detector, settings, calibration.batches, calibration.loss)
            if settings.needs_gradients:
                with fitted_head(detector, islice(calibration.batches, settings.direction_batches)):
                    gradients = weight_gradients(detector, settings, calibration.batches, calibration.loss)
            convert(detector, settings, target_modules=selected, gradients=gradients, progress=progress)
        except ValueError as error:  # as in `check`
            raise ConfigError(str(error)) from error

    def optimizer(self, detector: Detector, config: MethodConfig) -> MaskedAdamW:
        settings = self.settings(detector, config)
        groups = scale_free_groups(
            detector,
            config.lr,
            u_lr_scale=config.u_lr_scale,
            v_lr_scale=config.v_lr_scale,
            s_lr=config.s_lr,
            head_lr=config.head_lr,
            head_weight_decay=config.weight_decay,
        )
        return MaskedAdamW(
            groups,
            masks=None if settings.mask_policy in ("none", "static") else LayerMasks(detector, settings),
            orthogonality=settings.orthogonality,
            spectral_consistency=settings.spectral_consistency,
        )

    def penalty(self, optimizer: MaskedAdamW, config: MethodConfig) -> Callable[[], Tensor] | None:
        weights = config.masm.orthogonality, config.masm.spectral_consistency
        if not any(weights):
            return None
        return lambda: sum(weight * value for weight, value in zip(weights, optimizer.penalties))


def _refuse_settings_of_masks(config: MethodConfig) -> None:
    """Raise ConfigError if a setting of masks was changed, but the seed, which a run sets itself: nothing reads it."""
    values = {field.name: (getattr(config.masm, field.name), field.default) for field in fields(config.masm)}
    changed = [
        f"method.masm.{name}={value}"
        for name, (value, default) in values.items()
        if name.startswith("mask_") and name != "mask_seed" and value != default
    ]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: nothing reads this, because method.masm.mask_policy is none; choose a policy, "
            "for example bias_variance, or leave the other settings out"
        )


def _options(config: MethodConfig) -> dict[str, Any]:
    options = asdict(config.masm)
    return options | {"mask_seed": options["mask_seed"] or 0}


class MasmWithoutMasks(Masm):
    """Masm with every block free in every step."""

    def settings(self, detector: Detector, config: MethodConfig) -> MASMConfig:
        return super().settings(detector, replace(config, masm=replace(config.masm, mask_policy="none")))
