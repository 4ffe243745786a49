"""Models inside wrappers: ``torch.compile``, DataParallel, DistributedDataParallel, FSDP, activation checkpointing.

A wrapper adds a part to every name (``_orig_mod.``, ``module.``). Adapters and patterns use the names of the model
inside, so they do not depend on how a model was run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

#: Children under which torch.compile, FSDP and activation checkpointing keep the module inside.
_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: Wrappers that keep it under ``module``, a name that other modules use too. DeepSpeed is matched by name: it is no
#: dependency.
_WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)
_WRAPPER_NAMES = ("DeepSpeedEngine",)

M = TypeVar("M", bound=nn.Module)


def inner(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper; None if ``module`` is no wrapper."""
    for name in _INNER:
        if module._modules.get(name) is not None:
            return module._modules[name]
    if isinstance(module, _WRAPPERS) or type(module).__name__ in _WRAPPER_NAMES:
        return module._modules.get("module")
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside all wrappers around it. Wrappers of its submodules stay."""
    while (child := inner(model)) is not None:
        model = child
    return model


def unwrapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without wrappers: (name in the unwrapped model, module), each module once."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if module in seen:
            return
        seen.add(module)
        yield name, module
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{name}.{key}" if name else key)

    yield from walk(model, "")


def modules_of(model: nn.Module, kind: type[M]) -> dict[str, M]:
    """The modules of one class by their names in the unwrapped model, in module order."""
    return {name: m for name, m in unwrapped_modules(model) if isinstance(m, kind)}


def own_state(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of one module, not of its children, by their full names."""
    prefix = f"{name}." if name else ""
    for key, value in module._parameters.items():
        if value is not None:
            yield prefix + key, value
    for key, value in module._buffers.items():
        if value is not None and key not in module._non_persistent_buffers_set:
            yield prefix + key, value
