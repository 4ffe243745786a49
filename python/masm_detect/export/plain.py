"""A trained detector with plain `nn.Linear` layers only, whichever method trained it."""

from __future__ import annotations

import torch
from torch import nn

from masm_detect.models.detector import Detector
from masm_ext import MASMLinear, merge
from masm_ext.nn.quantized_linear import QuantizedLinear
from masm_ext.wrappers import modules_of


@torch.no_grad()
def make_plain(detector: Detector) -> None:
    """Replace every layer of a method by an `nn.Linear` with the same output up to rounding, in place.

    MASMLinears are merged. Weights of 8 bits get the dtype of the checkpoint again, with the values that they had in 8
    bits. The layers of the other methods (LoRA, OSF, Effort) are linear functions of their input, so their weight and
    bias are read off their outputs for 0 and for the unit vectors.
    """
    detector.eval()
    if modules_of(detector, MASMLinear):
        merge(detector, keep=False)
    for parent in list(detector.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, QuantizedLinear):
                setattr(parent, name, layer.to_linear())
            elif _is_adapted(layer):
                setattr(parent, name, _as_linear(layer))


def is_plain(detector: Detector) -> bool:
    """Whether no layer is one of a method: `make_plain` would change nothing."""
    return not any(_is_adapted(layer) for layer in detector.modules())


def _is_adapted(layer: nn.Module) -> bool:
    return type(layer) is not nn.Linear and hasattr(layer, "in_features") and hasattr(layer, "out_features")


def _as_linear(layer: nn.Module) -> nn.Linear:
    """An `nn.Linear` that computes the same affine function as `layer`."""
    tensor = next(layer.parameters())
    size = {"dtype": tensor.dtype, "device": tensor.device}
    bias = layer(torch.zeros(1, layer.in_features, **size))[0]  # [N]
    weight = (layer(torch.eye(layer.in_features, **size)) - bias).T.contiguous()  # [N, D]
    linear = nn.Linear(layer.in_features, layer.out_features, **size)
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias.clone())
    return linear.requires_grad_(False).eval()
