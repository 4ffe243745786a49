"""Stores the frozen weights of linear layers in 8 bits, about half the memory of bfloat16.

Decompose first (:func:`masm_ext.convert` or :func:`masm_ext.load_adapter`), then quantise: the singular directions are
those of the exact weight, and the learned factors stay in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .nn.masm_linear import MASMLinear
from .nn.quantized_linear import QuantizedLinear
from .quantized_weight import dense_weight, held_tensors, is_quantized
from .selection import replace_modules
from .wrappers import modules_of, unwrapped_modules

#: Names of the formats, with the largest rounding error of one element.
FORMATS = {
    "int8": "8-bit integers with one scale per row: at most 1/254 of the largest element of the row",
    "float8": "float8_e4m3fn with one scale per row: at most 1/16 of the element (near zero: 2e-6 of the row's)",
}


@dataclass(frozen=True)
class QuantizedWeight:
    """One row of a :class:`QuantizationReport`.

    Attributes:
        name: name of the module.
        shape: (N, D).
        error: ``||Q - W||_F / ||W||_F``, with W the frozen weight before and Q its values after.
        learned: ``||W_hat - W||_F / ||W||_F`` of what has been learned so far; None for a layer without subspaces.
        bytes_before, bytes_after: memory of the weight.
    """

    name: str
    shape: tuple[int, int]
    error: float
    learned: float | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`quantize` did; ``print(report)`` shows it as a table.

    Attributes:
        format: the name of the format.
        weights: the quantised weights, in module order.
    """

    format: str
    weights: tuple[QuantizedWeight, ...]

    @property
    def bytes_before(self) -> int:
        """Memory of these weights before."""
        return sum(w.bytes_before for w in self.weights)

    @property
    def bytes_after(self) -> int:
        """Memory of these weights now."""
        return sum(w.bytes_after for w in self.weights)

    def __str__(self) -> str:
        width = max(len("layer"), *(len(w.name) for w in self.weights))
        lines = [f"{'layer':<{width}}  {'shape':>13}  {'rounding':>9}  {'learned':>9}"]
        for w in self.weights:
            learned = "" if w.learned is None else f"{w.learned:.2e}"
            lines.append(f"{w.name:<{width}}  {w.shape[0]:>5} x {w.shape[1]:<5}  {w.error:>9.2e}  {learned:>9}")
        share = self.bytes_after / max(1, self.bytes_before)
        lines.append(
            f"{len(self.weights)} weights in {self.format}: {self.bytes_after / 2**20:.1f} MiB, {share:.2f} of "
            f"{self.bytes_before / 2**20:.1f} MiB; rounding and learned part relative to the norm of the weight"
        )
        return "\n".join(lines)


@torch.no_grad()
def quantize(
    model: nn.Module, format: str = "int8", *, include: Callable[[str, nn.Module], bool] | None = None
) -> QuantizationReport:
    """Keep the frozen weights of linear layers in 8 bits, in place.

    These are ``principal`` of every :class:`masm_ext.MASMLinear`, and ``weight`` of every plain, frozen ``nn.Linear``.
    Trained weights, weights that several modules share, embeddings, convolutions and norms stay. Training goes on as
    before, with the gradients of the rounded weights: the dense weight of a layer exists only during its products.
    :func:`masm_ext.save_adapter` and :func:`masm_ext.merge` work; the adapter belongs to the exact base, and the merged
    weight is the rounded one with the learned part. Groups (``MASMLinear.group``) are dissolved.

    Args:
        model: a converted model, or any model with frozen linear layers.
        format: "int8" (rounding about 0.5% of the norm of a weight) or "float8" (2.3%), from :data:`FORMATS`.
        include: called with the name and module of each layer; False leaves it as it is. None: all.

    Returns:
        The report: rounding beside the learned part, and memory, for each weight.

    Raises:
        ImportError: torchao is not installed (``pip install 'masm_ext[quantize]'``).
        ValueError: an unknown format; nothing to quantise; or weights that are quantised already, not finite, or on
            the meta device.
    """
    if format not in FORMATS:
        raise ValueError(f"quantize: format must be one of {', '.join(FORMATS)}, got {format!r}")
    shared = _shared_parameters(model)
    layers: dict[str, nn.Linear | MASMLinear] = {
        name: module
        for name, module in unwrapped_modules(model)
        if isinstance(module, MASMLinear) or (type(module) is nn.Linear and not module.weight.requires_grad)
        if id(module.weight) not in shared and (include is None or include(name, module))
    }
    if any(layer.is_adapter for layer in layers.values() if isinstance(layer, MASMLinear)):
        raise ValueError(
            "quantize: the model has MASM adapters of PEFT, and PEFT owns its weights: convert() it instead"
        )
    if modules_of(model, QuantizedLinear) or any(is_quantized(layer.weight) for layer in layers.values()):
        raise ValueError("quantize: the model has quantised weights already")
    if not layers:
        raise ValueError("quantize: the model has no MASMLinear and no frozen nn.Linear: convert() it first")
    for name, layer in layers.items():
        if layer.weight.is_meta or not layer.weight.isfinite().all():
            raise ValueError(f"quantize: {name}.weight is on the meta device or not finite")
    _tensor_types()  # before anything changes
    MASMLinear.ungroup([layer for layer in layers.values() if isinstance(layer, MASMLinear)])
    rows, replaced = [], {}
    for name, layer in layers.items():
        weight = layer.weight.detach()
        rounded = _rounded(weight, format)
        rows.append(_row(name, layer, weight, rounded))
        if isinstance(layer, MASMLinear):
            layer.principal, layer.quantized = rounded, True
        else:
            replaced[layer] = QuantizedLinear(layer, rounded)
    replace_modules(model, replaced)
    return QuantizationReport(format, tuple(rows))


def _shared_parameters(model: nn.Module) -> set[int]:
    """Identities of parameters that several modules own, such as an output layer tied to the embedding."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {key for key, number in owners.items() if number > 1}


def _tensor_types() -> tuple[Any, Any, Any]:
    try:
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
    except ImportError as error:
        raise ImportError("quantize needs torchao: pip install 'masm_ext[quantize]'") from error
    return Int8Tensor, Float8Tensor, PerRow


def _rounded(weight: Tensor, format: str) -> Tensor:
    Int8Tensor, Float8Tensor, PerRow = _tensor_types()
    weight = weight.float() if weight.dtype == torch.float64 else weight  # torchao knows up to float32
    if format == "int8":
        return Int8Tensor.from_hp(weight, PerRow())
    return Float8Tensor.from_hp(weight, torch.float8_e4m3fn, PerRow())


def _row(name: str, layer: nn.Linear | MASMLinear, weight: Tensor, rounded: Tensor) -> QuantizedWeight:
    wide = weight.double()
    norm = float(torch.linalg.vector_norm(wide))
    error = float(torch.linalg.vector_norm(dense_weight(rounded, torch.float32).double() - wide))
    return QuantizedWeight(
        name,
        (weight.shape[0], weight.shape[1]),
        error / norm if norm > 0 else 0.0,
        layer.relative_update() if isinstance(layer, MASMLinear) else None,
        weight.numel() * weight.element_size(),
        sum(part.numel() * part.element_size() for part in held_tensors(rounded)),
    )
