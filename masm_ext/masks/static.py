"""The static policy: selects the layers to convert, in one calibration pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..calibration import LossFunction, gradient_moments
from ..config import MASMConfig
from ..reference import snr_of
from ..selection import SelectedLayers, matching_linears
from .policies import bias_variance


def select_layers(
    model: nn.Module,
    config: MASMConfig,
    batches: Iterable[Any],
    loss_fn: LossFunction,
) -> SelectedLayers:
    """Before conversion, select the layers whose weight gradients agree most between batches.

    Per layer, with G_b the gradient of the weight on batch b of n: ``power = mean_b ||G_b||^2``, ``signal =
    (n ||mean_b G_b||^2 - power) / (n - 1)``, ``snr = signal / power``. The signal is the mean inner product over pairs
    of different batches, so noise gives 0 on average. The pass runs in eval mode; afterwards the mode, the
    ``requires_grad`` flags and the gradients of the model are as before.

    Args:
        model: the pretrained model.
        config: ``target_modules``, ``exclude_modules`` and ``modules_to_save`` give the candidates.
            ``mask_active_fraction`` (or ``mask_threshold``) and ``mask_min_active`` decide how many are selected.
            ``mask_calibration_batches`` is the maximum number of batches read.
        batches: at least two batches, each passed to ``loss_fn``.
        loss_fn: (model, batch) -> scalar loss.

    Returns:
        The full names of the selected layers, in module order. Pass them to ``convert(target_modules=...)``.

    Raises:
        ValueError: fewer than two batches, or no layer matches.
    """
    linears = matching_linears(model, config.target_modules, config.exclude_modules, config.modules_to_save)
    moments = gradient_moments(model, linears, batches, loss_fn, config.mask_calibration_batches)
    count = moments.batches
    if count < 2:
        raise ValueError(f"select_layers needs at least two batches to tell bias from variance, got {count}")
    second = torch.tensor(list(moments.power.values()), dtype=torch.float64)
    of_mean = torch.tensor([float(m.double().square().sum()) for m in moments.mean.values()], dtype=torch.float64)
    snr = snr_of((count * of_mean - second) / (count - 1), second)[:, None]
    chosen = bias_variance(snr, torch.zeros_like(snr), config)[:, 0]
    return SelectedLayers(name for name, keep in zip(linears, chosen) if keep)
