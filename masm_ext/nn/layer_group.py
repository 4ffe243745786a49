"""Layers that read the same x run as one call, although the model calls them one by one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..autocast import autocast_dtype
from ..ops import subspace_linear_group
from ..ops.strategies import MAX_LAYERS, MAX_RANK
from ..ops.subspace_linear_group import lie_side_by_side
from ..quantized_weight import is_quantized


class Member(Protocol):
    """What a group reads of a layer, which is a :class:`masm_ext.MASMLinear`."""

    principal: Tensor
    u: Tensor
    s: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor
    offsets: tuple[int, ...]
    layer_group: LayerGroup | None

    def own_bias(self) -> Tensor | None: ...


class LayerGroup:
    """MASMLinears of one shape that the forward of one module calls with the same x.

    The first call runs all of them (:func:`masm_ext.ops.subspace_linear_group`); the others take their outputs. Hooks
    on ``owner`` open and close a scope for the outputs around its forward, per thread. A call with another x, or after
    x or a weight was changed in place, runs all again.

    On CUDA their tensors are moved next to each other in memory, so that the kernels read them as one; a parameter
    stays the same object. Made by :meth:`masm_ext.MASMLinear.group`.
    """

    def __init__(self, layers: Sequence[Member], owner: nn.Module) -> None:
        self.layers = tuple(layers)
        self._scopes = _Scopes()
        self._hooks = (
            owner.register_forward_pre_hook(self._open, prepend=True),
            owner.register_forward_hook(self._close, always_call=True),
        )

    def _open(self, owner: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling():
            self._scopes.stack.append(_Scope())

    def _close(self, owner: nn.Module, args: tuple, output: object) -> None:
        if not torch.compiler.is_compiling() and self._scopes.stack:
            self._scopes.stack.pop()

    def output(self, layer: Member, x: Tensor) -> Tensor | None:
        """The output of a member, or None if it has to run on its own.

        That is outside the owner's forward, for a copy of a member (``copy.copy``, nn.DataParallel), and in inference
        mode, where a change of x cannot be detected."""
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        index = next((i for i, member in enumerate(self.layers) if member is layer), None)
        if index is None or not self._scopes.stack:
            return None
        scope = self._scopes.stack[-1]
        if scope.hooks is not _saving_hooks():  # a checkpoint inside the owner, whose recomputation has no scope
            return None
        if scope.x is not x or index not in scope.outputs or scope.outputs[index][0] != _state(layer, x):
            outputs = self._run(x)
            scope.x = x
            scope.outputs = {i: (_state(own, x), y) for i, (own, y) in enumerate(zip(self.layers, outputs))}
        return scope.outputs.pop(index)[1]

    def _run(self, x: Tensor) -> list[Tensor]:
        layers = self.layers
        if x.is_cuda:
            # buffers of a copy, or assigned again; parameters belong to their owner and are not moved
            self._lay_out(["principal", "mask"])
        return subspace_linear_group(
            x,
            [layer.principal for layer in layers],
            [layer.u for layer in layers],
            [layer.s for layer in layers],
            [layer.v for layer in layers],
            [] if layers[0].bias is None else [layer.own_bias() for layer in layers],
            offsets=layers[0].offsets,
            mask=[layer.mask for layer in layers],
        )

    def lay_out(self) -> None:
        """Put weights, factors, biases and masks one after another, once all are on one CUDA device in one dtype."""
        self._lay_out(["principal", "u", "s", "v", "bias", "mask"])

    @torch.no_grad()
    def _lay_out(self, names: Sequence[str]) -> None:
        for name in names:
            if name in ("principal", "bias") and isinstance(self.layers[0].principal, nn.Parameter):
                continue  # sharded: FSDP2 owns the memory of frozen parameters
            tensors = [getattr(layer, name) for layer in self.layers]
            if tensors[0] is None or len({(t.dtype, t.device) for t in tensors}) > 1 or not tensors[0].is_cuda:
                continue
            if not lie_side_by_side(tensors):
                for t, part in zip(tensors, torch.stack([t.detach() for t in tensors]).unbind(0)):
                    t.data = part

    def dissolve(self) -> None:
        for layer in self.layers:
            layer.layer_group = None
        for hook in self._hooks:
            hook.remove()


class _Scope:
    """One forward call of the owner: the x of its layers, and the outputs not yet taken, by the index of the layer,
    with the state they were computed in."""

    def __init__(self) -> None:
        self.hooks = _saving_hooks()
        self.x: Tensor | None = None
        self.outputs: dict[int, tuple[tuple, Tensor]] = {}


class _Scopes(threading.local):
    """The running calls of the owner in this thread, the innermost last. A copy starts with none."""

    def __init__(self) -> None:
        self.stack: list[_Scope] = []

    def __reduce__(self) -> tuple:
        return _Scopes, ()


def _saving_hooks() -> object | None:
    """The hook that packs saved tensors here, or None; inside a checkpoint it is another one."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def _state(layer: Member, x: Tensor) -> tuple:
    """What an output depends on: the versions of x and of the layer, and the modes."""
    tensors = (x, layer.principal, layer.u, layer.s, layer.v, layer.bias)
    # an inference tensor keeps no version
    versions = [None if t is None or t.is_inference() else t._version for t in tensors]
    return versions, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_dtype(x)


def check_group(layers: Sequence[Member]) -> None:
    """Raises ValueError if the layers cannot run as one call."""
    if not 2 <= len(layers) <= MAX_LAYERS or len({id(layer) for layer in layers}) < len(layers):
        raise ValueError(f"MASMLinear.group: expected 2 to {MAX_LAYERS} different layers, got {len(layers)}")
    if any(is_quantized(m.principal) for m in layers):
        raise ValueError("MASMLinear.group: layers with a quantised weight run one by one, and cannot be in a group")
    kinds = {
        (tuple(m.principal.shape), m.offsets, m.principal.dtype, m.u.dtype, m.principal.device, m.bias is None)
        for m in layers
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
