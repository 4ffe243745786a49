"""Parameter groups with rates of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn.masm_linear import masm_layers


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    s_lr_scale: float = 10.0,
    head_lr_scale: float = 1.0,
    weight_decay: float = 0.0,
    head_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups with rates of their own, for :class:`masm_ext.MaskedAdamW` or any other optimizer.

    "uv" has the rate ``lr``, "s" ``lr * s_lr_scale``, "head" (every other trainable parameter) ``lr * head_lr_scale``.
    The trailing singular values are tiny: du and dv start 100 to 1000 times smaller than those of LoRA, and a step in u
    or v moves the weight by s times the step.

    Args:
        model: a converted model.
        lr: the rate of u and v.
        s_lr_scale: rate of s over ``lr``.
        head_lr_scale: rate of the head over ``lr``.
        weight_decay: of u and v. s is never decayed: that would pull the pretrained spectrum to zero.
        head_weight_decay: of the head, ``weight_decay`` by default.

    Returns:
        The groups that have parameters.

    Raises:
        ValueError: nothing is trainable.
    """
    layers = masm_layers(model).values()
    uv = [p for layer in layers for p in (layer.u, layer.v) if p.requires_grad]
    s = [layer.s for layer in layers if layer.s.requires_grad]
    seen = {id(p) for p in [*uv, *s]}
    head = [p for p in model.parameters() if p.requires_grad and id(p) not in seen]
    head_decay = weight_decay if head_weight_decay is None else head_weight_decay
    groups = [
        {"name": "uv", "params": uv, "lr": lr, "weight_decay": weight_decay},
        {"name": "s", "params": s, "lr": lr * s_lr_scale, "weight_decay": 0.0},
        {"name": "head", "params": head, "lr": lr * head_lr_scale, "weight_decay": head_decay},
    ]
    groups = [g for g in groups if g["params"]]
    if not groups:
        raise ValueError("param_groups: the model has no trainable parameter; call convert(model, config) first")
    return groups
