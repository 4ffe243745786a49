"""Gradients of the weights before conversion, in one pass over calibration batches.

:func:`weight_gradients` gives the directions of ``MASMConfig(directions="gradient")``;
:func:`masm_ext.select_layers` reads the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .config import MASMConfig
from .selection import matching_linears

#: (model, batch) -> scalar loss.
LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class GradientMoments:
    """Moments of the gradients G_b of some weights over n batches.

    Attributes:
        mean: name of the layer -> ``mean_b G_b``, float32 [N, D].
        power: name of the layer -> ``mean_b ||G_b||_F^2``; 0 where it was not wanted.
        batches: n.
    """

    mean: dict[str, Tensor]
    power: dict[str, float]
    batches: int


class WeightGradients(dict[str, Tensor]):
    """Full name of a layer -> mean gradient of its weight [N, D]: the result of :func:`weight_gradients`."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode; afterwards each module is in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def gradient_moments(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Iterable[Any],
    loss_fn: LossFunction,
    limit: int,
    power: bool = True,
) -> GradientMoments:
    """One pass over at most ``limit`` batches, in eval mode; without ``power`` only the mean.

    Afterwards the mode, the ``requires_grad`` flags and the gradients of the model are as before.
    """
    flags = {p: p.requires_grad for p in model.parameters()}
    weights = [layer.weight for layer in linears.values()]
    mean = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    squares = [0.0] * len(weights)
    count = 0
    try:
        for p in flags:
            p.requires_grad_(False)
        for w in weights:
            w.requires_grad_(True)
        with evaluation_mode(model):  # batch statistics and dropout are neither moved nor measured
            for count, batch in enumerate(islice(batches, limit), start=1):
                grads = torch.autograd.grad(loss_fn(model, batch), weights, allow_unused=True, materialize_grads=True)
                for i, g in enumerate(grads):
                    mean[i] += (g.float() - mean[i]) / count
                    if power:
                        squares[i] += (float(g.double().square().sum()) - squares[i]) / count
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
    return GradientMoments(dict(zip(linears, mean)), dict(zip(linears, squares)), count)


def weight_gradients(
    model: nn.Module, config: MASMConfig, batches: Iterable[Any], loss_fn: LossFunction
) -> WeightGradients:
    """Before conversion, the mean gradients of the weights that ``config.target_modules`` selects.

    Pass them to ``convert(gradients=...)`` with ``directions="gradient"``. They show what lowers the loss of the model
    as it is: fit its head first, because through a head that was not trained they point in arbitrary directions.

    Args:
        model: the pretrained model, with a fitted head.
        config: ``target_modules``, ``exclude_modules`` and ``modules_to_save`` select the layers;
            ``direction_batches`` is the maximum number of batches read.
        batches: each is passed to ``loss_fn``. Afterwards the model is as before.
        loss_fn: (model, batch) -> scalar loss.

    Raises:
        ValueError: no batch, no layer matches, or a gradient is zero or not finite.
    """
    linears = matching_linears(model, config.target_modules, config.exclude_modules, config.modules_to_save)
    moments = gradient_moments(model, linears, batches, loss_fn, config.direction_batches, power=False)
    if not moments.batches:
        raise ValueError("weight_gradients needs at least one batch, got none")
    for name, mean in moments.mean.items():
        size = float(mean.norm())
        if not 0 < size < float("inf"):
            raise ValueError(
                f"{name}: the gradient of the weight has norm {size} over {moments.batches} batches; does the loss "
                "depend on this layer, and is the head fitted (not all zeros)?"
            )
    return WeightGradients(moments.mean)
