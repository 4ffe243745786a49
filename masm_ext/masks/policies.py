"""Mask policies by name: functions that choose, per subspace, the layers that may learn.

A new policy is one function with one ``register`` line; ``MASMConfig(mask_policy=name)`` then accepts it, and
:class:`masm_ext.LayerMasks` calls it between two steps on the host. ``masm::update_masks_`` computes FUSED_POLICY on
the device, without a wait (csrc/math/update_masks.h, masm_ext/kernels/mask_table.py).
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from ..config import MASMConfig
from ..reference import choose_layers
from ..registry import MASK_POLICIES

#: The policy that has a kernel.
FUSED_POLICY = "bias_variance"
#: The policy by which each subspace learns from one domain.
ROUTED_POLICY = "specialists"
#: Policies that select without measuring again: a probe would train what they masked.
UNPROBED = ("fixed", "random")


@MASK_POLICIES.register(FUSED_POLICY)
def bias_variance(snr: Tensor, current: Tensor, config: MASMConfig, step: int = 0) -> Tensor:
    """The dynamic policy: per subspace, the layers of largest snr.

    Args:
        snr: float64 [L, K], signal over power of every (layer, subspace), of ``config.mask_statistic``.
        current: float32 [L, K], the mask that is selected now.
        config: ``mask_active_fraction``, ``mask_threshold``, ``mask_hysteresis`` and ``mask_min_active`` are read.
        step: number of steps taken; not used here.

    Returns:
        The new mask, float32 [L, K], 0 or 1.
    """
    return choose_layers(snr, current, *ranking(config, len(snr)))


@MASK_POLICIES.register("inverted")
def inverted(snr: Tensor, current: Tensor, config: MASMConfig, step: int = 0) -> Tensor:
    """A control: per subspace, the layers of smallest snr, as many as :func:`bias_variance` selects."""
    return choose_layers(-snr, current, *ranking(config, len(snr)))


@MASK_POLICIES.register("random")
def random_layers(snr: Tensor, current: Tensor, config: MASMConfig, step: int) -> Tensor:
    """A control: per subspace, random layers, as many as ``mask_active_fraction`` says, drawn anew at each selection.

    The draw depends on ``config.mask_seed`` and the step only, so a resumed run draws the same.
    """
    generator = torch.Generator().manual_seed(config.mask_seed * 1_000_003 + step)
    noise = torch.rand(snr.shape, generator=generator, dtype=snr.dtype).to(snr.device)
    _, keep, _, least = ranking(config, len(snr))
    return choose_layers(noise, torch.zeros_like(current), 0.0, keep, 0.0, least)


@MASK_POLICIES.register("fixed")
def fixed(snr: Tensor, current: Tensor, config: MASMConfig, step: int) -> Tensor:
    """:func:`bias_variance` at the first selection; afterwards the mask stays."""
    first = step < max(1, config.mask_warmup) + config.mask_interval
    return bias_variance(snr, current, config) if first else current


@MASK_POLICIES.register("soft")
def soft(snr: Tensor, current: Tensor, config: MASMConfig, step: int = 0) -> Tensor:
    """Per subspace, updates scaled in proportion to the snr: 1 from the largest ``mask_active_fraction`` of the layers
    on, 0 for an snr of 0 or less.
    """
    _, keep, _, _ = ranking(config, len(snr))
    full = snr.sort(dim=0, descending=True).values[keep - 1].clamp_min(torch.finfo(snr.dtype).tiny)  # [K]
    scale = (snr / full).clamp(0, 1)
    # a block at 0 would never be measured again but for its probes; layers that must stay active take part in full
    top = choose_layers(snr, torch.zeros_like(current), 0.0, min(len(snr), max(1, config.mask_min_active)), 0.0, 1)
    return torch.maximum(scale.float(), top)


# A step on domain d updates subspace d modulo K only. There is nothing to select: LayerMasks sets these masks itself.
MASK_POLICIES.register(ROUTED_POLICY)(None)
# Layers chosen once, before conversion (masm_ext.select_layers), and no choice at all: the masks stay as they are.
MASK_POLICIES.register("static")(None)
MASK_POLICIES.register("none")(None)


def ranking(config: MASMConfig, L: int) -> tuple[float, int, float, int]:
    """(hysteresis, keep, threshold, least) of :func:`masm_ext.reference.choose_layers` for L layers."""
    least = min(L, max(1, config.mask_min_active))
    if config.mask_threshold is not None:
        return config.mask_hysteresis, 0, config.mask_threshold, least
    keep = min(L, max(least, math.ceil(Fraction(repr(float(config.mask_active_fraction))) * L)))
    return config.mask_hysteresis, keep, 0.0, least
