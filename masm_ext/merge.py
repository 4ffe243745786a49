"""Folding converted layers into plain ``nn.Linear`` layers for deployment, and back."""

from __future__ import annotations

from torch import nn

from .nn.masm_linear import MASMLinear
from .selection import replace_modules
from .wrappers import modules_of


class MergedLinear(nn.Linear):
    """An ``nn.Linear`` with a folded weight that keeps the MASMLinear it came from, so that :func:`unmerge` is exact.

    The parked layer is no submodule: it is in no state_dict, and ``.to`` reaches it only at unmerge.
    """

    def __init__(self, layer: MASMLinear) -> None:
        nn.Module.__init__(self)
        linear = layer.to_linear()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(layer.training)
        object.__setattr__(self, "parked", layer)

    def restored(self) -> MASMLinear:
        layer: MASMLinear = self.parked  # type: ignore[assignment]
        if self.weight.dtype != layer.weight.dtype:
            layer = layer.to(self.weight.dtype)
        return layer.to(self.weight.device).train(self.training)


def merge(model: nn.Module, *, keep: bool = True) -> int:
    """Fold every artifact part into its weight, in place: MASMLinears become ``nn.Linear`` layers for deployment.

    The merged output equals the converted one to the rounding of the weight's dtype (1e-5 relative in float32). In
    bfloat16 and float16 folding can bury small updates in the rounding of W: measure before you ship (docs/method.md,
    Numerics).

    Args:
        model: a converted model.
        keep: park the layers for :func:`unmerge`, at the price of their memory. Without it they become plain
            ``nn.Linear`` objects and the fold is final.

    Returns:
        The number of merged layers.

    Raises:
        ValueError: the model has no MASMLinear.
    """
    layers = modules_of(model, MASMLinear)
    if not layers:
        raise ValueError("merge: the model has no MASMLinear" + (" (it is merged already)" if _merged(model) else ""))
    replace_modules(model, {m: MergedLinear(m) if keep else m.to_linear() for m in layers.values()})
    return len(layers)


def unmerge(model: nn.Module) -> int:
    """Undo :func:`merge`: restore the parked MASMLinears bit for bit.

    Args:
        model: a model merged with ``keep=True``.

    Returns:
        The number of restored layers.

    Raises:
        ValueError: no merged layer is parked.
    """
    merged = _merged(model)
    if not merged:
        raise ValueError("unmerge: no merged layer to restore; merged with keep=False, or loaded from a state_dict?")
    replace_modules(model, {m: m.restored() for m in merged.values()})
    return len(merged)


def _merged(model: nn.Module) -> dict[str, MergedLinear]:
    return modules_of(model, MergedLinear)
