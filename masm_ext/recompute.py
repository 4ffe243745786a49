"""Saves activation memory: recomputes inputs of MASMLinears in the backward pass, where that is cheap."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Types that are cheap to run again, deterministic, and keep their input for their own backward pass. (ReLU, Tanh and
# Sigmoid keep their output: nothing would be saved.) Exact types: a subclass may add noise. Those of transformers by
# name, so that it need not be installed.
_TORCH_TYPES = (nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.SiLU, nn.Mish)
_TRANSFORMERS_TYPES = {
    ("transformers.activations", name)
    for name in (
        *("AccurateGELUActivation", "FastGELUActivation", "GELUActivation", "GELUTanh", "MishActivation"),
        *("NewGELUActivation", "PytorchGELUTanh", "QuickGELUActivation", "SiLUActivation"),
    )
}


@contextmanager
def recompute_inputs(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Do not store an input of a MASMLinear that the backward pass can recompute. Use it around the forward pass.

    For the gradient of v a MASMLinear stores its input x; a frozen linear layer stores nothing. If x is the output of a
    norm or an activation, autograd stores the input of that module anyway. Then x is not stored, and is recomputed from
    that input in the backward pass. The gradients are the same bit for bit. The backward pass may run outside the
    context. It raises RuntimeError if a tensor that it needs was changed in place.

    The output of a module is still stored if the module works in place, was called with keyword arguments, or has other
    forward hooks. Not for ``torch.compile``, which makes its own choice. Under autocast, x is dropped only if it
    already has the autocast dtype, because a cast makes a new tensor.

    Args:
        model: the model. Modules that may be recomputed are ``torch.nn`` LayerNorm, RMSNorm, GELU, SiLU and Mish, and
            the smooth activations of ``transformers.activations``, but no subclasses of them.
        modules: recompute these modules instead. Each must map one tensor to a new tensor, without randomness, and must
            store its input for its own backward pass; otherwise memory use rises.

    Yields:
        None.
    """
    chosen = [m for m in model.modules() if _runs_again(m)] if modules is None else list(modules)
    outputs: dict[tuple, _Output] = {}

    def remember(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if kwargs or len(args) != 1 or len(module._forward_hooks) != 1 or module._forward_pre_hooks:
            return
        (x,) = args
        if not (isinstance(x, Tensor) and isinstance(output, Tensor) and x.requires_grad):
            return
        if output.data_ptr() != x.data_ptr():
            outputs[_key(output)] = _Output(weakref.ref(output), output._version, _Rebuilt(module, x))

    def pack(t: Tensor) -> _Kept | _Rebuilt:
        found = outputs.get(_key(t))
        # the same memory may by now hold another tensor
        if found is None or found.tensor() is None or t._version != found.version:
            return _Kept(t, t._version)
        found.rebuilt.uses += 1
        return found.rebuilt

    def unpack(saved: _Kept | _Rebuilt) -> Tensor:
        if isinstance(saved, _Rebuilt):
            return saved.tensor()
        if saved.tensor._version != saved.version:  # with hooks, autograd does not check this itself
            raise RuntimeError(
                f"recompute_inputs: a tensor of shape {list(saved.tensor.shape)} that the backward pass needs was "
                f"changed in place (version {saved.tensor._version}, expected {saved.version})"
            )
        return saved.tensor

    hooks = [m.register_forward_hook(remember, with_kwargs=True) for m in chosen]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        outputs.clear()
        for hook in hooks:
            hook.remove()


def _runs_again(module: nn.Module) -> bool:
    kind = type(module)
    exact = kind in _TORCH_TYPES or (kind.__module__, kind.__qualname__) in _TRANSFORMERS_TYPES
    return exact and "forward" not in module.__dict__  # a patched forward may do anything


def _key(t: Tensor) -> tuple:
    return (t.data_ptr(), t.dtype, t.shape, t.stride())


class _Rebuilt:
    """The output of a module, computed again once for all nodes that saved it."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = module, x
        self.versions = self._versions()
        device = x.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self.uses = 0  # times that autograd saved it
        self._left = 0
        self._tensor: Tensor | None = None

    def _versions(self) -> list[tuple[int, int]]:
        own = (*self.module.parameters(), *self.module.buffers())
        return [(id(t), t._version) for t in (self.x, *own)]

    def tensor(self) -> Tensor:
        result = self._tensor
        if result is None:
            if self._versions() != self.versions:
                raise RuntimeError(
                    f"recompute_inputs: the input or the weights of {type(self.module).__name__} were changed in place "
                    "after the forward pass; leave that module out, or run backward first"
                )
            device, dtype, enabled = self.autocast
            with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                result, self._left = self.module.forward(self.x), self.uses
        self._left -= 1
        self._tensor = result if self._left > 0 else None
        return result


@dataclass
class _Kept:
    tensor: Tensor
    version: int


@dataclass
class _Output:
    tensor: weakref.ref
    version: int
    rebuilt: _Rebuilt
