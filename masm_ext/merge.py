"""Folding converted layers into plain ``nn.Linear`` layers for deployment, and back."""

from __future__ import annotations

from torch import nn

from .nn.masm_linear import MASMLinear
from .selection import replace_modules
from .sharded import is_sharded
from .wrappers import modules_of


class MergedLinear(nn.Linear):
    """An ``nn.Linear`` with the folded weight. It keeps its MASMLinear for :func:`unmerge`.

    The MASMLinear is not a submodule: it is in no state_dict, and ``.to`` moves it only when it is restored.
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
    """Replace every MASMLinear by an ``nn.Linear`` with the folded weight, in place, for deployment.

    The output changes only by the rounding of the weight's dtype (1e-5 relative in float32). In bfloat16 and float16
    small updates can be lost in the rounding of W: compare outputs before you deploy (docs/method.md, Numerics).

    Args:
        model: a converted model.
        keep: keep the MASMLinears in memory for :func:`unmerge`. If False, the layers become plain ``nn.Linear``
            objects, and the merge cannot be undone.

    Returns:
        The number of merged layers.

    Raises:
        ValueError: the model has no MASMLinear, its adapters are those of PEFT, or it is sharded.
    """
    layers = modules_of(model, MASMLinear)
    if not layers:
        raise ValueError("merge: the model has no MASMLinear" + (" (it is merged already)" if _merged(model) else ""))
    if any(layer.is_adapter for layer in layers.values()):
        raise ValueError("merge: the model has adapters of PEFT; use its merge_and_unload() or merge_adapter()")
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            "merge: the model is divided among processes; save_adapter(model, folder) in every process, and "
            "load_adapter(pretrained, folder) on a whole model"
        )
    replace_modules(model, {m: MergedLinear(m) if keep else m.to_linear() for m in layers.values()})
    return len(layers)


def unmerge(model: nn.Module) -> int:
    """Undo :func:`merge`: restore the MASMLinears bit for bit.

    Args:
        model: a model merged with ``keep=True``.

    Returns:
        The number of restored layers.

    Raises:
        ValueError: the model has no merged layer that can be restored.
    """
    merged = _merged(model)
    if not merged:
        raise ValueError("unmerge: no merged layer to restore; merged with keep=False, or loaded from a state_dict?")
    replace_modules(model, {m: m.restored() for m in merged.values()})
    return len(merged)


def _merged(model: nn.Module) -> dict[str, MergedLinear]:
    return modules_of(model, MergedLinear)
