"""Which modules a pattern names: exact name, dotted suffix, glob, regular expression or a callable."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence

from torch import nn

Patterns = str | Sequence[str] | Callable[[str, nn.Module], bool]


def matches(name: str, module: nn.Module, patterns: Patterns) -> bool:
    if callable(patterns):
        return bool(patterns(name, module))
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if pattern.startswith("re:"):
            if re.fullmatch(pattern[3:], name):
                return True
        elif any(c in pattern for c in "*?["):
            if fnmatch.fnmatchcase(name, pattern):
                return True
        elif name == pattern or name.endswith("." + pattern):
            return True
    return False


# Modules whose fast path reads the weights of their Linears directly, past forward(): a converted layer inside them
# would be ignored without a word.
FUSED_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def matching_linears(
    model: nn.Module, target: Patterns, exclude: Patterns = (), save: Patterns = ()
) -> dict[str, nn.Linear]:
    """The ``nn.Linear`` modules that ``target`` names and ``exclude`` does not, outside the modules that ``save`` names
    (those stay as they are), in module order. A module with several names is listed under its first.

    Raises ValueError if there is none, naming some that exist, and for weights that cannot be replaced (shared with
    another module, hooks on the module, the model itself); TypeError for subclasses of nn.Linear and for layers inside
    modules that bypass ``forward``.
    """
    found: dict[str, nn.Linear] = {}
    saved = [name for name, m in model.named_modules() if matches(name, m, save)]
    parents = [(name, m) for name, m in model.named_modules() if isinstance(m, FUSED_PARENTS)]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not matches(name, module, target) or matches(name, module, exclude):
            continue
        if any(name == root or name.startswith(root + ".") for root in saved):
            continue
        if not name:
            raise ValueError("the model is itself the layer; use MASMLinear.from_linear, or wrap it in nn.Sequential")
        for parent_name, parent in parents:
            if name.startswith(parent_name + "." if parent_name else ""):
                raise TypeError(
                    f"{name!r} lies inside {type(parent).__name__} {parent_name!r}, which reads its weights without "
                    "calling forward; use an implementation that calls its nn.Linear projections (Hugging Face's), "
                    "or exclude it"
                )
        if type(module) is not nn.Linear:
            raise TypeError(
                f"{name!r} is a {type(module).__name__}, a subclass of nn.Linear that conversion would change; "
                "exclude it, or replace it by a plain nn.Linear first (after merge(model), use keep=False)"
            )
        _check_replaceable(model, name, module)
        found[name] = module
    if not found:
        existing = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        described = getattr(target, "__name__", target)
        raise ValueError(
            f"target_modules {described!r} match no nn.Linear. The model has {len(existing)}"
            + (f", for example {', '.join(existing[:6])}" if existing else "")
        )
    return found


def _check_replaceable(model: nn.Module, name: str, linear: nn.Linear) -> None:
    for other_name, other in model.named_modules():
        if other is not linear and any(p is linear.weight for p in other._parameters.values()):
            raise ValueError(
                f"{name!r} shares its weight with {other_name!r}; converting one would part them: exclude it"
            )
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        raise ValueError(f"{name!r} has hooks, which conversion would drop: convert first, then register them")


def replace_modules(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put each new module where the old one is, under every name it has."""
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):  # named_children lists a module once
            if child in new:
                setattr(parent, child_name, new[child])
