"""A cheaper ``torch.library.register_autograd``, and the rules of the ops under ``torch.func``.

``register_autograd`` looks up schema defaults and walks lists of tensors as pytrees, for arguments and results. For
these ops that takes about as much host time as the rest of the call (benchmarks/gpu_model/host.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Below the tracking of views, too: an op returns new memory, even if it returns a view of what it allocated.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
_library = torch.library.Library("masm", "IMPL")


def register_derivative(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """Register the derivative of ``masm::name``.

    Forward-mode derivatives raise NotImplementedError. Under ``torch.vmap`` the rule of :func:`register_batching`
    applies.

    Args:
        name: name of the op.
        backward: as for ``torch.library.register_autograd``.
        setup_context: likewise, but ``ctx.needs_input_grad`` has one entry per tensor of a list. None: the op has no
            derivative, and ``backward`` raises the error.

    Returns:
        A function that calls the op. It also works inside ``torch.func`` transforms.
    """
    op = getattr(torch.ops.masm, name).default
    arguments = op._schema.arguments
    defaults = tuple(a.default_value for a in arguments)
    lists = [str(a.type) == "List[Tensor]" for a in arguments]
    single = len(op._schema.returns) == 1
    batched = register_batching(name)

    def run(args: Sequence[Any], sizes: _Sizes) -> tuple[Tensor, ...]:
        results = (op(*args),) if single else op(*args)
        sizes.results = _sizes(results)
        return tuple(_flat(results, sizes.results))

    def set_up(ctx, args: Sequence[Any], flat_results: Sequence[Tensor], sizes: _Sizes) -> None:
        if setup_context is not None:
            # the dispatcher leaves out trailing arguments that are equal to their defaults
            setup_context(ctx, (*args, *defaults[len(args) :]), _nested(flat_results, sizes.results))
        ctx.sizes = sizes

    def forward(ctx, *given):
        *flat, sizes = given
        args = _nested(flat, sizes.arguments)
        with below_autograd():
            results = run(args, sizes)
        set_up(ctx, args, results, sizes)
        return results

    def flat_backward(ctx, *grads):
        needed = backward(ctx, *_nested(grads, ctx.sizes.results))
        return *_flat(needed, ctx.sizes.arguments), None

    # named after the op: autograd shows the name in graphs, profiles and errors
    static = {"forward": staticmethod(forward), "backward": staticmethod(flat_backward)}
    Derivative = type(f"{name}_derivative", (torch.autograd.Function,), static)

    # torch.func needs these two apart, and calls `forward` on the values of its innermost level
    def forward_alone(*given):
        *flat, sizes = given
        return run(_nested(flat, sizes.arguments), sizes)

    def setup_alone(ctx, inputs, output):
        *flat, sizes = inputs
        set_up(ctx, _nested(flat, sizes.arguments), output, sizes)

    def no_jvp(ctx, *tangents):
        raise NotImplementedError(
            f"masm::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, dual numbers); "
            "use reverse mode: backward(), torch.func.grad, vjp or jacrev"
        )

    def over_batch(info, in_dims, *given):
        *flat, sizes = given
        *dims, _ = in_dims
        results, out_dims = batched(info, _nested(dims, sizes.arguments), *_nested(flat, sizes.arguments))
        if single:
            results, out_dims = (results,), (out_dims,)
        sizes.results = _sizes(results)
        return tuple(_flat(results, sizes.results)), tuple(_flat(out_dims, sizes.results))

    static |= {
        "forward": staticmethod(forward_alone),
        "setup_context": staticmethod(setup_alone),
        "jvp": staticmethod(no_jvp),
        "vmap": staticmethod(over_batch),
    }
    UnderTransforms = type(f"{name}_derivative", (torch.autograd.Function,), static)

    def applied(function: type[torch.autograd.Function], args: Sequence[Any]) -> Any:
        sizes = _Sizes(_sizes_of_arguments(args, lists))
        results = function.apply(*_flat(args, sizes.arguments), sizes)
        return results[0] if single else tuple(_nested(results, sizes.results))

    def differentiable(*args):
        flat = _flat(args, _sizes_of_arguments(args, lists))
        if torch._C._are_functorch_transforms_active():
            if setup_context is None:
                backward(None)
            raise NotImplementedError(
                f"torch.ops.masm.{name} cannot be differentiated under torch.func; call masm_ext.ops.{name} instead"
            )
        if forward_ad._current_level >= 0 and any(isinstance(t, Tensor) and _has_tangent(t) for t in flat):
            no_jvp(None)
        if not torch.is_grad_enabled() or not any(isinstance(t, Tensor) and t.requires_grad for t in flat):
            with below_autograd():
                return op(*args)
        return applied(Derivative, args)

    def call(*args):
        if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
            return applied(UnderTransforms, args)
        return op(*args)

    _library.impl(name, differentiable, "Autograd")
    return call


def register_batching(name: str) -> Callable[..., Any]:
    """Register the ``torch.vmap`` rule of ``masm::name``: if only x is batched, the batch becomes rows of one call;
    otherwise there is one call per entry. Returns the rule: (info, dimensions, *arguments) -> (results, dimensions)."""
    op = getattr(torch.ops.masm, name).default

    def batched(info, in_dims, *args):
        rest = _flat(in_dims[1:], _sizes(in_dims[1:]))
        if name in _ROWS and in_dims[0] is not None and all(d is None for d in rest):
            results = op(args[0].movedim(in_dims[0], 0), *args[1:])
        else:
            if info.batch_size == 0:
                raise NotImplementedError(f"masm::{name}: torch.vmap over an empty batch of parameters has no result")
            calls = [op(*(_entry(a, d, b) for a, d in zip(args, in_dims))) for b in range(info.batch_size)]
            if isinstance(calls[0], Tensor):
                results = torch.stack(calls)
            else:
                results = tuple(
                    [torch.stack(parts) for parts in zip(*outputs)]
                    if isinstance(outputs[0], (list, tuple))
                    else torch.stack(outputs)
                    for outputs in zip(*calls)
                )
        if isinstance(results, Tensor):
            return results, 0
        return results, tuple([0] * len(r) if isinstance(r, (list, tuple)) else 0 for r in results)

    torch.library.register_vmap(f"masm::{name}", batched, lib=_library)
    return batched


#: Ops whose first argument is rows of activations [..., D], and whose outputs have the same rows.
_ROWS = ("subspace_linear", "subspace_linear_group")


def _entry(argument: Any, dim: Any, b: int) -> Any:
    """Entry b of the batch of an argument."""
    if isinstance(argument, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_entry(t, d, b) for t, d in zip(argument, dim)]
    return argument if dim is None else argument.select(dim, b)


def _has_tangent(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None


class _Sizes:
    """The lengths of the lists among arguments and results, None for a single value. (No pytree: torch.func passes it
    through unchanged.)"""

    def __init__(self, arguments: list[int | None]) -> None:
        self.arguments = arguments
        self.results: list[int | None] = []


def _sizes(items: Iterable[Any]) -> list[int | None]:
    """The length of each list among `items`, None for a single value."""
    return [len(item) if isinstance(item, (list, tuple)) else None for item in items]


def _sizes_of_arguments(args: Sequence[Any], lists: Sequence[bool]) -> list[int | None]:
    return [len(a) if is_list else None for a, is_list in zip(args, lists)]


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
