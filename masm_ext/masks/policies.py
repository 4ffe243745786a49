"""Mask policies by name: functions that choose, per subspace, the layers that may learn.

A new policy is one function with one ``register`` line; ``MASMConfig(mask_policy=name)`` then accepts it, and
:class:`masm_ext.LayerMasks` calls it between two steps on the host. ``masm::update_masks_`` computes FUSED_POLICY on
the device, without a wait (csrc/math/update_masks.h, masm_ext/kernels/mask_table.py).
"""

from __future__ import annotations

import math
from fractions import Fraction

from torch import Tensor

from ..config import MASMConfig
from ..reference import choose_layers
from ..registry import MASK_POLICIES

#: The policy that has a kernel.
FUSED_POLICY = "bias_variance"


@MASK_POLICIES.register(FUSED_POLICY)
def bias_variance(snr: Tensor, current: Tensor, config: MASMConfig) -> Tensor:
    """The dynamic policy: per subspace, the layers of largest snr.

    Args:
        snr: float64 [L, K], signal over power of every (layer, subspace).
        current: float32 [L, K], the mask that is selected now.
        config: ``mask_active_fraction``, ``mask_threshold``, ``mask_hysteresis`` and ``mask_min_active`` are read.

    Returns:
        The new mask, float32 [L, K], 0 or 1.
    """
    return choose_layers(snr, current, *ranking(config, len(snr)))


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
