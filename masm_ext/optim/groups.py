"""Parameter groups with their own learning rates."""

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
    """Parameter groups with their own learning rates, for :class:`masm_ext.MaskedAdamW` or any other optimizer.

    Group "uv" has the rate ``lr``, group "s" ``lr * s_lr_scale``, and group "head" (every other trainable parameter)
    ``lr * head_lr_scale``. Trailing singular values are tiny: the gradients of u and v start 100 to 1000 times smaller
    than those of LoRA, and a change of u or v changes the weight by s times as much.

    Args:
        model: a converted model.
        lr: learning rate of u and v.
        s_lr_scale: learning rate of s, relative to ``lr``.
        head_lr_scale: learning rate of the head, relative to ``lr``.
        weight_decay: weight decay of u and v. s is never decayed, because decay would pull the pretrained spectrum
            towards zero.
        head_weight_decay: weight decay of the head; None: ``weight_decay``.

    Returns:
        The non-empty groups.

    Raises:
        ValueError: the model has no trainable parameter.
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
