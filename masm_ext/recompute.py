"""Activation memory: the inputs of MASMLinears are rebuilt in the backward pass where that costs little."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Modules that are cheap to run again and give the same output: norms, and the activations of torch and transformers.
_NORMS = ("LayerNorm", "RMSNorm")
_ACTIVATION_FILES = ("torch.nn.modules.activation", "transformers.activations")
_NOT_AGAIN = (nn.MultiheadAttention, nn.RReLU)  # no activation; random


@contextmanager
def recompute_inputs(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Run the forward pass inside; the backward pass may be anywhere.

    A frozen linear layer keeps nothing for the backward pass; a MASMLinear keeps its input x, for dv. Where x is the
    output of a norm or an activation, whose own input autograd keeps anyway, x is dropped and computed once more from
    that input when dv is due. Gradients are the same bit for bit, as long as these modules are deterministic.

    Args:
        model: its norms (classes named ...LayerNorm or ...RMSNorm) and activations (of ``torch.nn`` and
            ``transformers.activations``) are the modules that may run again.
        modules: these instead; each must map one tensor to one tensor, without randomness.

    Not for ``torch.compile``, which decides on recomputation itself. Under autocast only inputs that are already in
    the autocast dtype are dropped (a cast makes a new tensor). Raises RuntimeError in the backward pass if the input of
    such a module was changed in place since.
    """
    chosen = [m for m in model.modules() if _runs_again(m)] if modules is None else list(modules)
    outputs: dict[tuple, _Output] = {}

    def remember(module: nn.Module, args: tuple, output: Any) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor) and args[0].requires_grad:
            key = (output.data_ptr(), output.shape, output.stride())
            outputs[key] = _Output(weakref.ref(output), output._version, _Rebuilt(module, args[0]))

    def pack(t: Tensor) -> Tensor | _Rebuilt:
        found = outputs.get((t.data_ptr(), t.shape, t.stride()))
        # the same memory may by now hold another tensor
        if found is None or found.tensor() is None or t._version != found.version:
            return t
        found.rebuilt.uses += 1
        return found.rebuilt

    def unpack(saved: Tensor | _Rebuilt) -> Tensor:
        return saved.tensor() if isinstance(saved, _Rebuilt) else saved

    hooks = [m.register_forward_hook(remember) for m in chosen]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _runs_again(module: nn.Module) -> bool:
    kind = type(module)
    if kind.__name__.endswith(_NORMS):
        return True
    return kind.__module__ in _ACTIVATION_FILES and not isinstance(module, _NOT_AGAIN)


class _Rebuilt:
    """The output of a module, to be computed again: once for all who saved it."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x, self.version = module, x, x._version
        device = x.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self.uses = 0  # how often it was saved
        self._left = 0
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        if self._tensor is None:
            if self.x._version != self.version:
                raise RuntimeError(
                    f"recompute_inputs: the input of {type(self.module).__name__} was changed in place after the "
                    f"forward pass (version {self.x._version}, expected {self.version}); leave that module out"
                )
            device, dtype, enabled = self.autocast
            with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                self._tensor, self._left = self.module.forward(self.x), self.uses
        result = self._tensor
        self._left -= 1
        if self._left <= 0:
            self._tensor = None
        return result


@dataclass
class _Output:
    tensor: weakref.ref
    version: int
    rebuilt: _Rebuilt
