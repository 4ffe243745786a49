"""Layers that read the same x, run as one call while the model goes on calling them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import subspace_linear_group
from ..ops.homes import MAX_LAYERS, MAX_RANK
from ..ops.subspace_linear_group import lie_side_by_side

if TYPE_CHECKING:
    from .masm_linear import MASMLinear

#: Sibling modules that are the projections of one attention, by the names that libraries give them.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)


class LayerGroup:
    """MASMLinears of one shape that are called with the same x, one after another: the first call runs all of them
    (:func:`masm_ext.ops.subspace_linear_group`), the others fetch their outputs. A call with another x starts anew, and
    so does one after x was changed in place (seen in eager mode only, not by torch.compile).

    On CUDA their tensors are laid one after another in memory, so that the kernels read them as one; a parameter stays
    the object it was. Made by :meth:`masm_ext.MASMLinear.group`.
    """

    def __init__(self, layers: Sequence[MASMLinear]) -> None:
        self.layers = tuple(layers)
        self._x: Tensor | None = None
        self._outputs: dict[int, tuple[tuple, Tensor]] = {}  # by the layer's place: the state it was computed in, y

    def output(self, layer: MASMLinear, x: Tensor) -> Tensor:
        index = next(i for i, member in enumerate(self.layers) if member is layer)
        if self._x is not x or index not in self._outputs or self._outputs[index][0] != _state(layer, x):
            outputs = self._run(x)
            self._x = x
            self._outputs = {i: (_state(own, x), y) for i, (own, y) in enumerate(zip(self.layers, outputs))}
        _, y = self._outputs.pop(index)
        if not self._outputs:
            self._x = None
        return y

    def holds(self, layer: MASMLinear) -> bool:
        """False for a copy of a member, as ``copy.copy`` and nn.DataParallel make: it runs on its own."""
        return any(member is layer for member in self.layers)

    def _run(self, x: Tensor) -> list[Tensor]:
        layers = self.layers
        if x.is_cuda and not torch.compiler.is_compiling():
            # of a copy, or assigned anew; parameters are left to whoever owns them
            self._lay_out(["weight", "mask"])
        return subspace_linear_group(
            x,
            [layer.weight for layer in layers],
            [layer.u for layer in layers],
            [layer.s for layer in layers],
            [layer.v for layer in layers],
            [] if layers[0].bias is None else [layer.bias for layer in layers],
            offsets=layers[0].offsets,
            mask=[layer.mask for layer in layers],
        )

    def lay_out(self) -> None:
        """Put weights, factors, biases and masks one after another, once all are on one CUDA device in one dtype."""
        self._lay_out(["weight", "u", "s", "v", "bias", "mask"])

    @torch.no_grad()
    def _lay_out(self, names: Sequence[str]) -> None:
        for name in names:
            tensors = [getattr(layer, name) for layer in self.layers]
            if tensors[0] is None or len({(t.dtype, t.device) for t in tensors}) > 1 or not tensors[0].is_cuda:
                continue
            if not lie_side_by_side(tensors):
                for t, part in zip(tensors, torch.stack([t.detach() for t in tensors]).unbind(0)):
                    t.data = part

    def __getstate__(self) -> dict:
        """For copies and pickles: without the outputs that wait for a call."""
        return {"layers": self.layers, "_x": None, "_outputs": {}}

    def dissolve(self) -> None:
        for layer in self.layers:
            layer.layer_group = None
        self._x, self._outputs = None, {}


def _state(layer: MASMLinear, x: Tensor) -> tuple:
    """What else an output depends on: x and the layer as they were, and the modes it was computed under."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if torch.compiler.is_compiling():  # cannot compare versions, nor ask for the inference mode
        return torch.is_grad_enabled(), autocast
    # an inference tensor keeps no version
    versions = [
        None if t is None or t.is_inference() else t._version
        for t in (x, layer.weight, layer.u, layer.s, layer.v, layer.bias)
    ]
    return versions, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


def check_group(layers: Sequence[MASMLinear]) -> None:
    """Raises ValueError if the layers cannot run as one call."""
    if not 2 <= len(layers) <= MAX_LAYERS or len({id(layer) for layer in layers}) < len(layers):
        raise ValueError(f"MASMLinear.group: expected 2 to {MAX_LAYERS} different layers, got {len(layers)}")
    kinds = {
        (tuple(m.weight.shape), m.offsets, m.weight.dtype, m.u.dtype, m.weight.device, m.bias is None) for m in layers
    }
    if len(kinds) > 1:
        raise ValueError(
            "MASMLinear.group: the layers must agree in shape, ranks, dtype, device and in having a bias, got "
            + "; ".join(sorted(map(str, kinds)))
        )
    together = len(layers) * layers[0].offsets[-1]
    if together > MAX_RANK:
        raise ValueError(
            f"MASMLinear.group: {len(layers)} layers of R = {layers[0].offsets[-1]} have {together} directions "
            f"together; a group serves {MAX_RANK}"
        )
    if any(layer.layer_group is not None for layer in layers):
        raise ValueError("MASMLinear.group: a layer is in a group already; MASMLinear.ungroup(layers) first")


def group_projections(model: nn.Module, names: Sequence[Sequence[str]] = PROJECTIONS) -> int:
    """Group the query, key and value projections of every self-attention of a converted model.

    Siblings under one parent with the names of one entry of ``names``, all MASMLinears of one shape and with at most
    256 directions together, become a group (:meth:`masm_ext.MASMLinear.group`). For attentions that read one x only:
    where key and value read another input (cross-attention), each call would compute projections nobody asks for.

    Returns the number of groups. Layers that are grouped already are left as they are.
    """
    from .masm_linear import MASMLinear

    count = 0
    for parent in model.modules():
        for siblings in names:
            layers = [getattr(parent, name, None) for name in siblings]
            if not all(isinstance(m, MASMLinear) and m.layer_group is None for m in layers):
                continue
            same = len({(m.weight.shape, m.offsets) for m in layers}) == 1
            if same and len(layers) * layers[0].offsets[-1] <= MAX_RANK:
                MASMLinear.group(layers)
                count += 1
    return count
