"""Which modules a pattern names, and which ``nn.Linear`` layers can be converted.

A pattern is an exact module name, a dotted suffix, a glob, a regular expression or a callable. An exact name wins:
where a module of that full name exists, the pattern names that module alone. Names are those of the unwrapped model.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .contract import dtype_name
from .wrappers import inner, own_state, unwrapped_modules

Patterns = str | Sequence[str] | Callable[[str, nn.Module], bool]

#: Weight dtypes that a MASMLinear can hold.
WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Modules whose fast path reads the weights of their Linears without calling forward(): it would silently ignore a
# converted layer.
FUSED_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class SelectedLayers(list[str]):
    """Full names of layers that the static policy chose: the result of :func:`masm_ext.select_layers`.

    With ``mask_policy="static"``, :func:`masm_ext.convert` takes no other ``target_modules``. ``SelectedLayers(names)``
    restores one from names in a file.
    """


def named_by(modules: Mapping[str, nn.Module], patterns: Patterns, *, exact_first: bool = True) -> set[str]:
    """The names among ``modules`` (all modules of a model by name) that match ``patterns``.

    ``exact_first=False``: a plain pattern that is a full name also matches as a dotted suffix (adapters of format
    version 1).
    """
    if isinstance(patterns, SelectedLayers):
        missing = [name for name in patterns if name not in modules]
        if missing:
            raise ValueError(
                f"the selected layers were chosen on another model: this one has no {', '.join(missing[:4])}"
                + (" ..." if len(missing) > 4 else "")
            )
        return set(patterns)
    if callable(patterns):
        return {name for name, module in modules.items() if patterns(name, module)}
    found: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if pattern.startswith("re:"):
            found |= {name for name in modules if re.fullmatch(pattern[3:], name)}
        elif any(c in pattern for c in "*?["):
            found |= {name for name in modules if fnmatch.fnmatchcase(name, pattern)}
        else:
            exact = pattern in modules
            found |= {pattern} if exact else set()
            if not (exact and exact_first):
                found |= {name for name in modules if name.endswith("." + pattern)}
    return found


def saved_modules(modules: Mapping[str, nn.Module], patterns: Sequence[str], *, exact_first: bool = True) -> list[str]:
    """The names that ``modules_to_save`` matches, in module order. Raises ValueError for a pattern without a match."""
    for pattern in patterns:
        if not named_by(modules, pattern):
            raise ValueError(f"modules_to_save {pattern!r} matches no module of the model")
    named = named_by(modules, patterns, exact_first=exact_first)
    return [name for name in modules if name in named]


def is_under(name: str, roots: Iterable[str]) -> bool:
    """Whether a module or tensor is one of the modules ``roots`` or lies inside one."""
    return any(not root or name == root or name.startswith(root + ".") for root in roots)


def saved_state(modules: Mapping[str, nn.Module], saved: Collection[str]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the modules that travel with the adapter, by full name."""
    return {key: value for name, m in modules.items() if is_under(name, saved) for key, value in own_state(name, m)}


def matching_linears(
    model: nn.Module, target: Patterns, exclude: Patterns = (), save: Patterns = ()
) -> dict[str, nn.Linear]:
    """The ``nn.Linear`` modules that match ``target`` but not ``exclude``, outside the modules that match ``save``.

    In module order; a module with several names is listed under its first.

    Raises:
        ValueError: none matches; the message names some that exist. Or as :func:`check_convertible`.
        TypeError: as :func:`check_convertible`.
    """
    modules = dict(unwrapped_modules(model))
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    # a callable is called for nn.Linears only
    wanted, excluded = (named_by(linears if callable(p) else modules, p) for p in (target, exclude))
    saved = named_by(modules, save)
    found = {name: m for name, m in linears.items() if name in wanted - excluded and not is_under(name, saved)}
    if not found:
        described = getattr(target, "__name__", target)
        others = [f"{name!r} is a {type(modules[name]).__name__}" for name in sorted(wanted - set(linears)) if name]
        raise ValueError(
            f"target_modules {described!r} match no nn.Linear. The model has {len(linears)}"
            + (f", for example {', '.join(list(linears)[:6])}" if linears else "")
            + (f" ({', '.join(others[:3])}; an exact name names that module alone)" if others else "")
        )
    check_convertible(model, found)
    return found


def check_convertible(model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
    """Check that conversion can put a MASMLinear in place of each module without changing what the model computes.

    Raises:
        TypeError: subclasses of nn.Linear, weights that are tensor subclasses or of an unsupported dtype, and layers
            inside modules that bypass ``forward``.
        ValueError: the model itself, layers with a wrapper or a ``forward`` of their own, hooks, parameters shared with
            other modules, weights on the meta device, and models inside FSDP.
    """
    if any("_fsdp_wrapped_module" in m._modules for m in model.modules()):
        raise ValueError("FullyShardedDataParallel holds the weights of this model: convert first, then wrap")
    fused = [(name, m) for name, m in unwrapped_modules(model) if isinstance(m, FUSED_PARENTS)]
    wrappers = {inner(m): type(m).__name__ for m in model.modules() if inner(m) is not None}
    owners: dict[int, list[str]] = {}
    for name, m in unwrapped_modules(model):
        for p in m._parameters.values():
            owners.setdefault(id(p), []).append(name)
    for name, linear in linears.items():
        if not name:
            raise ValueError("the model is itself the layer; use MASMLinear.from_linear, or wrap it in nn.Sequential")
        for parent_name, parent in fused:
            if is_under(name, [parent_name]):
                raise TypeError(
                    f"{name!r} lies inside {type(parent).__name__} {parent_name!r}, which reads its weights without "
                    "calling forward; use an implementation that calls its nn.Linear projections (Hugging Face's), "
                    "or exclude it"
                )
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"{name!r} is a {type(linear).__name__}, a subclass of nn.Linear that conversion would change; "
                "exclude it, or replace it by a plain nn.Linear first (after merge(model), use keep=False)"
            )
        if linear in wrappers:
            raise ValueError(
                f"{name!r} is wrapped on its own in a {wrappers[linear]}, which would go on calling the layer that "
                "conversion replaces: convert first, then wrap"
            )
        if "forward" in linear.__dict__:
            kind = type(linear.__dict__["forward"]).__name__
            raise ValueError(
                f"{name!r} has a forward of its own (a {kind} set on the instance, as accelerate's hooks do), which "
                "conversion would drop: convert first, or remove it"
            )
        if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
            raise ValueError(f"{name!r} has hooks, which conversion would drop: convert first, then register them")
        extra = [*set(linear._parameters) - {"weight", "bias"}, *linear._buffers, *linear._modules]
        if extra:
            raise ValueError(
                f"{name!r} holds {', '.join(sorted(extra))} beside its weight and bias, which conversion would drop: "
                "exclude it, or move them to another module"
            )
        for key in ("weight", "bias"):
            _check_parameter(name, key, linear, owners)


def _check_parameter(name: str, key: str, linear: nn.Linear, owners: Mapping[int, list[str]]) -> None:
    p = linear._parameters.get(key)
    if p is None:
        if key == "bias" and getattr(linear, "bias", None) is None:
            return
        raise TypeError(f"{name!r} has no parameter {key!r} of its own (is it sharded, or computed from others?)")
    if type(p) is not nn.Parameter or type(p.data) is not Tensor:
        kind = type(p) if type(p) is not nn.Parameter else type(p.data)
        raise TypeError(
            f"{name}.{key} is a {kind.__name__} ({p.dtype}), a tensor subclass (quantized or sharded?); supported are "
            f"plain tensors of {_dtypes()}: convert the model before it is quantized or sharded, or exclude the layer"
        )
    if p.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"{name}.{key} has dtype {dtype_name(p.dtype)}; supported are {_dtypes()}: cast the model, or exclude the "
            "layer"
        )
    if p.is_meta:
        raise ValueError(f"{name}: the {key} is on the meta device; load the pretrained weights first")
    others = [owner for owner in owners[id(p)] if owner != name]
    if others:
        raise ValueError(f"{name!r} shares its {key} with {others[0]!r}; converting one would part them: exclude it")


def _dtypes() -> str:
    return ", ".join(dtype_name(dtype) for dtype in WEIGHT_DTYPES)


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module where the old one is, under every name it has.

    Raises ValueError, before anything is changed, for a module that is wrapped on its own.
    """
    for parent in model.modules():
        child = inner(parent)
        if child in new:
            raise ValueError(
                f"a {type(child).__name__} is wrapped on its own in a {type(parent).__name__}, which would go on "
                "calling it: wrap the model, or a larger part of it, instead"
            )
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):  # named_children lists a module once
            if child in new:
                setattr(parent, child_name, new[child])
