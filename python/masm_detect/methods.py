"""The adaptation methods that are compared: each turns a frozen detector into one that trains some of its weights.

| name | trains | source |
|---|---|---|
| probe | the head only | |
| full | everything | |
| lora | rank-r additions to the target layers | Hugging Face PEFT, LoRA |
| osf | the last singular directions, gradients kept orthogonal to the frozen ones | Hugging Face PEFT, OSF |
| effort | the last singular direction, dense weight rebuilt each forward | Effort (ICML 2025), `effort.py` |
| masm-nomask | K artifact subspaces with the two penalties, no masks | `masm_ext` |
| masm | the same under selective layer masks | `masm_ext` |

The head is trained in all of them. All share the loop, the data, the schedule and the precision of `train.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import METHODS, ConfigError, MethodConfig
from .effort import apply_effort
from .models.detector import Detector


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of a method, its weight decay, and its rank where it has one."""

    lr: float
    head_lr: float = 1e-3
    s_lr: float | None = None
    weight_decay: float = 1e-2
    rank: int | None = None


# Peak rates used where a config leaves them null.
DEFAULTS: dict[str, Rates] = {
    "probe": Rates(lr=1e-3, head_lr=3e-3),
    "full": Rates(lr=3e-5),
    "lora": Rates(lr=1e-3, rank=8),
    "osf": Rates(lr=1e-3, rank=12),
    "effort": Rates(lr=1e-3, rank=1),
    "masm-nomask": Rates(lr=1e-3, s_lr=5e-3, head_lr=3e-3),
    "masm": Rates(lr=1e-3, s_lr=5e-3, head_lr=3e-3),
}


@dataclass
class Method:
    """A detector made trainable in one way. `penalty` reports, after a step, the weighted penalties that the optimizer
    applied in it, or is None; `masks` only for masm.
    """

    name: str
    optimizer: torch.optim.Optimizer
    penalty: Callable[[], Tensor] | None
    masks: Any | None
    trainable_parameters: int

    @property
    def is_masm(self) -> bool:
        """Does `masm_ext` hold its adapter (so that `masm_ext.save_adapter` writes it)?"""
        return self.name.startswith("masm")


def resolve(config: MethodConfig) -> MethodConfig:
    """`config` with every null rate and rank replaced by the default of its method: what a run really used."""
    defaults = DEFAULTS[config.name]
    values = {name: getattr(config, name) for name in ("lr", "s_lr", "head_lr", "weight_decay", "rank")}
    return replace(config, **{k: getattr(defaults, k) if value is None else value for k, value in values.items()})


def build_method(
    name: str,
    detector: Detector,
    config: MethodConfig,
    seed: int,
    *,
    calibration: Iterable[Any] | None = None,
    calibration_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    progress: bool = False,
) -> Method:
    """Adapt `detector` in place by the method called `name`.

    `seed` makes the new random weights (head, LoRA's A) the same in every run. `calibration` (batches) and
    `calibration_loss` are needed by masm's static mask policy only.

    Raises:
        ConfigError: unknown name, or a rank that the layers do not have.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    config = resolve(replace(config, name=name))
    prepare_detector(detector, config, seed, calibration, calibration_loss, progress)
    optimizer, penalty, masks = (
        _masm_training(detector, config) if name.startswith("masm") else _peer_training(detector, config)
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    count = sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad)
    return Method(name, optimizer, penalty, masks, count)


def prepare_detector(
    detector: Detector,
    config: MethodConfig,
    seed: int,
    calibration: Iterable[Any] | None = None,
    calibration_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    progress: bool = False,
) -> None:
    """The model's half of `build_method`: new layers in place, and `requires_grad` set; no optimizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector.head.reset_parameters()
        if config.name.startswith("masm"):
            _convert_masm(detector, config, calibration, calibration_loss, progress)
            return
        detector.requires_grad_(config.name == "full")
        model, names = detector.backbone.model, target_names(detector, config)
        if config.name == "lora":
            _inject_lora(model, names, config.rank)
        elif config.name == "osf":
            _check_rank(model, names, config)
            _inject_osf(model, names, config.rank)
        elif config.name == "effort":
            _check_rank(model, names, config)
            apply_effort(model, names, config.rank)
        detector.head.requires_grad_(True)


def target_names(detector: Detector, config: MethodConfig) -> list[str]:
    """Names, inside the backbone's model, of the linear layers that the method adapts."""
    names = detector.backbone.linear_names("attention")
    if config.targets == "attention+mlp":
        names = names + detector.backbone.linear_names("mlp")
    return names


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError('the methods lora and osf need the package peft: pip install "masm_ext[peers]"') from error
    return peft


def _inject(model: nn.Module, peft_config: Any) -> None:
    # In place, without a PeftModel around it: the detector keeps its own forward, and freezing is PEFT's.
    _peft().inject_adapter_in_model(peft_config, model)


def _inject_lora(model: nn.Module, names: list[str], rank: int) -> None:
    _inject(model, _peft().LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names))


def _check_rank(model: nn.Module, names: list[str], config: MethodConfig) -> None:
    for name in names:
        q = min(model.get_submodule(name).weight.shape)
        if not 1 <= config.rank < q:
            raise ConfigError(f"method.rank is {config.rank}, but {name} has q = {q}: {config.name} needs 1..{q - 1}")


def _inject_osf(model: nn.Module, names: list[str], rank: int) -> None:
    # OSF's `effective_rank` is the number of directions kept FROZEN, so it depends on the layer's shape.
    frozen = {re.escape(name) + "$": min(model.get_submodule(name).weight.shape) - rank for name in names}
    _inject(model, _peft().OSFConfig(target_modules=names, rank_pattern=frozen))


def _peer_training(detector: Detector, config: MethodConfig) -> tuple[torch.optim.Optimizer, None, None]:
    head = list(detector.head.parameters())
    adapter = [parameter for parameter in detector.backbone.parameters() if parameter.requires_grad]
    groups = [{"params": head, "lr": config.head_lr, "weight_decay": config.weight_decay}]
    if adapter:
        groups.append({"params": adapter, "lr": config.lr, "weight_decay": config.weight_decay})
    return torch.optim.AdamW(groups, lr=config.lr), None, None


def masm_config(detector: Detector, config: MethodConfig) -> Any:
    """The `masm_ext.MASMConfig` of a run."""
    from masm_ext import MASMConfig

    targets = list(detector.backbone.attention_targets)
    if config.targets == "attention+mlp":
        targets += detector.backbone.mlp_targets
    options = asdict(config.masm)
    if config.name == "masm-nomask":
        options["mask_policy"] = "none"
    return MASMConfig(target_modules=targets, modules_to_save=("head",), **options)


def _convert_masm(
    detector: Detector,
    config: MethodConfig,
    calibration: Iterable[Any] | None,
    calibration_loss: Callable[[nn.Module, Any], Tensor] | None,
    progress: bool,
) -> None:
    try:
        settings = masm_config(detector, config)
        _convert(detector, settings, calibration, calibration_loss, progress)
    except ValueError as error:
        # masm_ext names the field, what arrived and what is allowed.
        raise ConfigError(str(error)) from error


def _convert(
    detector: Detector,
    settings: Any,
    calibration: Iterable[Any] | None,
    calibration_loss: Callable[[nn.Module, Any], Tensor] | None,
    progress: bool,
) -> None:
    from masm_ext import convert, select_layers

    selected = None
    if settings.mask_policy == "static":
        if calibration is None or calibration_loss is None:
            raise ConfigError("mask_policy 'static' chooses layers on calibration batches, and none were given")
        selected = select_layers(detector, settings, calibration, calibration_loss)
    convert(detector, settings, target_modules=selected, progress=progress)


def _masm_training(
    detector: Detector, config: MethodConfig
) -> tuple[torch.optim.Optimizer, Callable[[], Tensor] | None, Any]:
    from masm_ext import LayerMasks, MaskedAdamW, param_groups

    settings = masm_config(detector, config)
    masks = LayerMasks(detector, settings) if settings.mask_policy == "bias_variance" else None
    groups = param_groups(
        detector,
        lr=config.lr,
        s_lr_scale=config.s_lr / config.lr,
        head_lr_scale=config.head_lr / config.lr,
        weight_decay=config.weight_decay,
    )
    weights = settings.orthogonality, settings.spectral_consistency
    optimizer = MaskedAdamW(groups, masks=masks, orthogonality=weights[0], spectral_consistency=weights[1])

    def penalty() -> Tensor:
        return sum(weight * value for weight, value in zip(weights, optimizer.penalties))

    return optimizer, penalty if any(weights) else None, masks
