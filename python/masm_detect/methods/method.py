"""What an adaptation method provides: default rates, trainable layers, an optimizer.

`MethodSpec` is the base class of the methods, one file each. `build.build_method` applies one to a detector and returns
a `Method`, which the training loop uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from masm_detect.config import MethodConfig
from masm_detect.models.detector import Detector
from masm_ext import QuantizationReport


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of a method, its weight decay, and its rank if it has one."""

    lr: float
    head_lr: float = 3e-3
    s_lr: float | None = None
    u_lr_scale: float | None = 1.0
    v_lr_scale: float = 1.0
    weight_decay: float = 1e-2
    rank: int | None = None


@dataclass(frozen=True)
class Calibration:
    """Batches, and the loss of (detector, batch), on which a method may look at the model before training.

    `batches` may be iterated more than once, each time with the same content.
    """

    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]


class MethodSpec:
    """An adaptation method. The defaults train the head with AdamW and freeze everything else.

    Attributes:
        rates: used where a config leaves a rate or the rank null
        uses_masm_ext: `masm_ext` saves and loads the adapter, and its optimizer skips a step whose loss is not finite
    """

    rates: ClassVar[Rates]
    uses_masm_ext: ClassVar[bool] = False

    def check(self, config: MethodConfig) -> None:
        """Raise ConfigError for settings that this method cannot use; called before any data are read."""

    def prepare(
        self, detector: Detector, config: MethodConfig, calibration: Calibration | None = None, progress: bool = False
    ) -> None:
        """Put the new layers into `detector` in place and set `requires_grad` of all its parameters."""
        detector.requires_grad_(False)
        self.adapt(detector.backbone.model, target_names(detector, config), config)
        detector.head.requires_grad_(True)

    def adapt(self, model: nn.Module, names: list[str], config: MethodConfig) -> None:
        """Replace or extend the linear layers of the frozen `model` called `names`; their new weights are trained."""

    def optimizer(self, detector: Detector, config: MethodConfig) -> torch.optim.Optimizer:
        """The optimizer of the trainable parameters; each group carries its peak rate as "lr"."""
        adapter = [parameter for parameter in detector.backbone.parameters() if parameter.requires_grad]
        head = list(detector.head.parameters())
        groups = [{"name": "head", "params": head, "lr": config.head_lr, "weight_decay": config.weight_decay}]
        if adapter:
            groups.append({"name": "adapter", "params": adapter, "lr": config.lr, "weight_decay": config.weight_decay})
        return torch.optim.AdamW(groups, lr=config.lr)

    def penalty(self, optimizer: torch.optim.Optimizer, config: MethodConfig) -> Callable[[], Tensor] | None:
        """A function that returns the weighted penalty (scalar) that the last step applied; None without penalties."""
        return None


@dataclass
class Method:
    """A detector made trainable by one method.

    Attributes:
        name: its name in the registry
        penalty: returns the weighted penalty (scalar) that the optimizer applied in the last step; None without
        masks: the `masm_ext.LayerMasks` of masm, else None
        uses_masm_ext: as in `MethodSpec`
    """

    name: str
    optimizer: torch.optim.Optimizer
    penalty: Callable[[], Tensor] | None
    masks: Any | None
    trainable_parameters: int
    uses_masm_ext: bool = False
    quantization: QuantizationReport | None = None


def target_names(detector: Detector, config: MethodConfig) -> list[str]:
    """Names, inside the backbone's model, of the linear layers that `config.targets` selects."""
    names = detector.backbone.linear_names("attention")
    if config.targets == "attention+mlp":
        names = names + detector.backbone.linear_names("mlp")
    return names
