"""The report of a conversion, printed as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .nn.masm_linear import MASMLinear
from .selection import is_under
from .wrappers import own_state, unwrapped_modules


@dataclass(frozen=True)
class ConvertedLayer:
    """One row of a :class:`ConversionReport`.

    Attributes:
        name: name of the module.
        shape: (N, D), output and input features.
        ranks: (r_1, ..., r_K).
        trainable_share: trainable parameters of the layer, relative to all parameters of the replaced ``nn.Linear``.
        energy: share of ``||W||_F^2`` in the artifact part.
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    trainable_share: float
    energy: float


@dataclass(frozen=True)
class ConversionReport:
    """The report of :func:`masm_ext.convert`; ``print(report)`` shows it as a table.

    Attributes:
        layers: the converted layers, in module order.
        trainable_parameters: number of trainable parameters (elements).
        total_parameters: number of parameters (elements) before the conversion.
        other_trainable: name and shape of every trainable parameter outside the converted layers.
    """

    layers: tuple[ConvertedLayer, ...]
    trainable_parameters: int
    total_parameters: int
    other_trainable: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __str__(self) -> str:
        width = max(len("layer"), *(len(r.name) for r in self.layers))
        lines = [f"{'layer':<{width}}  {'shape':>13}  {'ranks':<14}  {'trainable':>9}  {'energy':>8}"]
        for r in self.layers:
            shape = f"{r.shape[0]} x {r.shape[1]}"
            ranks = "+".join(map(str, r.ranks))
            lines.append(f"{r.name:<{width}}  {shape:>13}  {ranks:<14}  {r.trainable_share:>9.2%}  {r.energy:>8.1e}")
        lines.append(
            f"{len(self.layers)} layers converted; {self.trainable_parameters:,} of {self.total_parameters:,} "
            f"parameters trainable ({self.trainable_parameters / max(1, self.total_parameters):.2%})"
        )
        if self.other_trainable:
            lines.append("trainable outside the converted layers:")
            lines += [f"  {name}  {' x '.join(map(str, shape)) or 'scalar'}" for name, shape in self.other_trainable]
        return "\n".join(lines)


def report_of(
    model: nn.Module, linears: Mapping[str, nn.Linear], built: Mapping[str, MASMLinear], total: int
) -> ConversionReport:
    """The report of a model in which ``built`` took the place of ``linears``; ``total``: its parameters before."""
    rows = []
    for name, linear in linears.items():
        layer = built[name]
        trainable = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        replaced = sum(p.numel() for p in linear.parameters())
        shape = (layer.out_features, layer.in_features)
        rows.append(ConvertedLayer(name, shape, layer.ranks, trainable / replaced, layer.energy))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others: dict[nn.Parameter, str] = {}
    for name, p in trainable_parameters(model).items():
        if not is_under(name, linears):
            others.setdefault(p, name)  # a parameter with several names is listed once
    return ConversionReport(tuple(rows), trainable, total, tuple((name, tuple(p.shape)) for p, name in others.items()))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by their full names in the unwrapped model."""
    state = (pair for name, module in unwrapped_modules(model) for pair in own_state(name, module))
    return {name: p for name, p in state if isinstance(p, nn.Parameter) and p.requires_grad}
