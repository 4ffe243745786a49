"""``torch.library.register_autograd`` with less work per call.

What that does beside calling an ``autograd.Function`` (it looks up defaults in the schema, and walks lists of tensors
as pytrees, in and out) costs the host about as much time as the rest of a call of these ops (benchmarks/host.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Below the tracking of views, too: what an op returns is new memory, though it may have made it as a view of such.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
_library = torch.library.Library("masm", "IMPL")


def register_derivative(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """Give ``masm::name``, which returns a tuple, its derivative.

    Both functions are as ``torch.library.register_autograd`` takes them, but that ``ctx.needs_input_grad`` counts the
    tensors of a list one by one.
    """
    op = getattr(torch.ops.masm, name).default
    arguments = op._schema.arguments
    defaults = tuple(a.default_value for a in arguments)
    lists = [str(a.type) == "List[Tensor]" for a in arguments]

    def forward(ctx, *given):
        *args, sizes, result_sizes = given
        args = _nested(args, sizes)
        with below_autograd():
            results = op(*args)
        if setup_context is not None:
            # the dispatcher leaves out trailing arguments that are equal to their defaults
            setup_context(ctx, (*args, *defaults[len(args) :]), results)
        ctx.sizes = sizes
        ctx.result_sizes = result_sizes
        result_sizes += _sizes(results)
        return tuple(_flat(results, result_sizes))

    def flat_backward(ctx, *grads):
        needed = backward(ctx, *_nested(grads, ctx.result_sizes))
        return *_flat(needed, ctx.sizes), None, None

    # made by name: autograd shows it in graphs, profiles and errors
    static = {"forward": staticmethod(forward), "backward": staticmethod(flat_backward)}
    Derivative = type(f"{name}_derivative", (torch.autograd.Function,), static)

    def differentiable(*args):
        sizes = [len(a) if is_list else None for a, is_list in zip(args, lists)]
        flat = _flat(args, sizes)
        if not torch.is_grad_enabled() or not any(isinstance(t, Tensor) and t.requires_grad for t in flat):
            with below_autograd():
                return op(*args)
        result_sizes: list[int | None] = []
        results = Derivative.apply(*flat, sizes, result_sizes)
        return tuple(_nested(results, result_sizes))

    _library.impl(name, differentiable, "Autograd")


def _sizes(items: Iterable[Any]) -> list[int | None]:
    """The length of each list among `items`, None for what is no list."""
    return [len(item) if isinstance(item, (list, tuple)) else None for item in items]


def _flat(items: Iterable[Any], sizes: Sequence[int | None]) -> list[Any]:
    flat: list[Any] = []
    for item, size in zip(items, sizes):
        if size is None:
            flat.append(item)
        else:
            flat += item
    return flat


def _nested(flat: Iterable[Any], sizes: Sequence[int | None]) -> list[Any]:
    items = iter(flat)
    return [next(items) if size is None else [next(items) for _ in range(size)] for size in sizes]
