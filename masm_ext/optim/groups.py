"""Parameter groups with their own learning rates."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..nn.masm_linear import MASMLinear, masm_layers

#: Rate of s in a layer with a lift, and without, where s alone can move the weight.
S_LR = {True: 1e-5, False: 1e-3}


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
    ``lr * head_lr_scale``. Trailing singular values are tiny, and a change of u or v changes the weight by s times as
    much.

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
    layers, head = _parts(model)
    uv = [p for layer in layers for p in (layer.u, layer.v) if p.requires_grad]
    s = [layer.s for layer in layers if layer.s.requires_grad]
    head_decay = weight_decay if head_weight_decay is None else head_weight_decay
    groups = [
        {"name": "uv", "params": uv, "lr": lr, "weight_decay": weight_decay},
        {"name": "s", "params": s, "lr": lr * s_lr_scale, "weight_decay": 0.0},
        {"name": "head", "params": head, "lr": lr * head_lr_scale, "weight_decay": head_decay},
    ]
    return [g for g in groups if g["params"]]


def scale_free_groups(
    model: nn.Module,
    lr: float = 3.5e-2,
    *,
    u_lr_scale: float | None = None,
    v_lr_scale: float = 0.5,
    s_lr: float | None = None,
    head_lr: float = 1e-3,
    head_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups whose rates say what one step does to a layer at the start, whatever its width, rank and norm.

    Over many steps the change still depends on width and rank: docs/evidence.md, "Rates and width".

    AdamW moves every element of a parameter by about its learning rate in a step. The rates here are what that does to
    a layer. In a layer with a lift, a step of u moves the weight by ``lr * sigma_rms`` a direction, where
    sigma_rms is the root mean square of the weight's singular values: that is a turn by ``lr * sigma_rms / s``. So with
    a small lift u is learned from almost nothing while v turns slowly, as in LoRA, whose second factor starts at 0.
    Without a lift a step turns u by ``lr`` of its length, which is 1 at the start; only the orthogonality penalty, if
    it is on, pulls it back to 1. A step turns v by ``v_lr_scale * lr`` of its length. If all singular values move
    together, they change the weight by ``s_lr`` of its norm.

    The elements of u [R, N] have the rate ``u_lr_scale * lr / sqrt(N)``, those of v [R, D] ``v_lr_scale * lr /
    sqrt(D)``, and those of s [R] ``s_lr * ||W||_F / sqrt(R)``. None of them is decayed: that would pull the pretrained
    weight towards zero.

    Args:
        model: a converted model.
        lr: change of the weight by u in each direction in one step, relative to sigma_rms.
        u_lr_scale: turn of a direction of u, relative to ``lr``; None: in a layer with a lift sigma_rms over the root
            mean square of its initial singular values, in others 1.
        v_lr_scale: turn of a direction of v, relative to ``lr``.
        s_lr: change of the weight in one step by its singular values, relative to ``||W||_F``; None: 1e-5 in a layer
            with a lift, 1e-3 in others.
        head_lr: learning rate of the head (every other trainable parameter), as in ``torch.optim.AdamW``.
        head_weight_decay: weight decay of the head, as in ``torch.optim.AdamW``.

    Returns:
        The non-empty groups: one for each rate of directions ("uv"), one for each layer ("s"), and "head".

    Raises:
        ValueError: the model has no trainable parameter.
    """
    layers, head = _parts(model)
    by_rate: dict[float, list[Tensor]] = {}
    of_s: list[dict[str, Any]] = []
    for layer in layers:
        norm = layer.base_norm()  # reads the whole weight, and gathers it where it is divided among processes
        scale = _u_lr_scale(layer, norm) if u_lr_scale is None else u_lr_scale
        for factor, own in ((layer.u, scale), (layer.v, v_lr_scale)):
            if factor.requires_grad:
                by_rate.setdefault(own * lr / math.sqrt(factor.shape[1]), []).append(factor)
        if layer.s.requires_grad:
            own = S_LR[bool(layer.lift)] if s_lr is None else s_lr
            of_s.append(
                {"name": "s", "params": [layer.s], "lr": own * norm / math.sqrt(len(layer.s)), "weight_decay": 0.0}
            )
    groups = [{"name": "uv", "params": p, "lr": rate, "weight_decay": 0.0} for rate, p in by_rate.items()] + of_s
    if head:
        groups.append({"name": "head", "params": head, "lr": head_lr, "weight_decay": head_weight_decay})
    return groups


def _u_lr_scale(layer: MASMLinear, norm: float) -> float:
    """What makes u move the weight (of this norm) as far as a turn of a direction of size sigma_rms would, if the layer
    has a lift.
    """
    sigma_rms = norm / math.sqrt(min(layer.u.shape[1], layer.v.shape[1]))
    s_rms = float(layer.s0.double().square().mean().sqrt())
    return sigma_rms / s_rms if layer.lift and s_rms else 1.0


def _parts(model: nn.Module) -> tuple[list[MASMLinear], list[Tensor]]:
    """The MASMLinears of a model, and every other trainable parameter. Raises ValueError if nothing is trainable."""
    layers = list(masm_layers(model).values())
    own = {id(p) for layer in layers for p in (layer.u, layer.s, layer.v)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter; call convert(model, config) first")
    return layers, [p for p in trainable if id(p) not in own]
