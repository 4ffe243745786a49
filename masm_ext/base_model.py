"""The frozen base of a converted model: which tensors belong to it, and what identifies them.

An adapter is bound to these identities, so that it is never put on another base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from .contract import dtype_name
from .hashing import tensor_hashes
from .nn.masm_linear import MASMLinear
from .selection import is_under, saved_modules, saved_state
from .sharded import is_sharded
from .wrappers import modules_of, own_state, unwrap, unwrapped_modules

#: Attributes of a converted model: its config, and the identity of its frozen tensors at conversion.
CONFIG_ATTRIBUTE = "masm_config"
BASE_ATTRIBUTE = "masm_base"

#: A frozen tensor of the base: {"sha256", "dtype", "shape"}.
BaseEntry = dict[str, Any]


def base_tensors(
    modules: Mapping[str, nn.Module],
    layers: Collection[str],
    saved: Collection[str],
    train_bias: bool,
    *,
    sharded: bool = False,
) -> dict[str, Tensor]:
    """The tensors of the base that an adapter is bound to, beside the weights of its ``layers``, by full name.

    Every parameter and floating-point persistent buffer that is not saved with the adapter; the same before and after
    conversion.

    Raises:
        ValueError: a tensor is on the meta device, or, unless ``sharded``, a DTensor, which holds the part of one rank.
    """
    travelling = {id(t) for t in saved_state(modules, saved).values()}
    found: dict[str, Tensor] = {}
    for name, module in modules.items():
        if is_under(name, saved):
            continue
        for key, value in own_state(name, module):
            own = key.rpartition(".")[2]
            if name in layers and (own != "bias" or train_bias):
                continue
            if id(value) in travelling or (own in module._buffers and not value.is_floating_point()):
                continue
            if not (sharded and is_sharded(value)):
                check_whole(key, value)
            found[key] = value
    return found


def check_whole(name: str, value: Tensor) -> None:
    """Raises ValueError for a tensor on the meta device or a DTensor."""
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device; load the pretrained weights first")
    if is_sharded(value):
        raise ValueError(f"{name} is a DTensor, each rank holds a part of it: gather the model first (full_tensor())")


def base_entries(tensors: Mapping[str, Tensor], hashes: Mapping[str, str]) -> dict[str, BaseEntry]:
    """The identity of frozen tensors, as adapter.json holds it."""
    return {
        name: {"sha256": hashes[name], "dtype": dtype_name(t.dtype), "shape": list(t.shape)}
        for name, t in tensors.items()
    }


def record_base(model: nn.Module) -> None:
    """Take the frozen tensors of a converted model as its base from now on.

    For a model whose base weights were loaded after :func:`masm_ext.convert`, by ``load_state_dict``:
    :func:`masm_ext.save_adapter` refuses frozen tensors that differ from those at conversion.

    Args:
        model: the module that was given to :func:`masm_ext.convert`.

    Raises:
        ValueError: another module.
    """
    root, modules = unwrap(model), dict(unwrapped_modules(model))
    config = root.__dict__.get(CONFIG_ATTRIBUTE)
    if config is None:
        raise ValueError("record_base: pass the module that was given to convert()")
    saved = saved_modules(modules, config.modules_to_save)
    frozen = base_tensors(modules, modules_of(model, MASMLinear), saved, config.train_bias)
    setattr(root, BASE_ATTRIBUTE, base_entries(frozen, tensor_hashes(frozen)))
