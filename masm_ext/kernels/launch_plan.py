"""Launch plans: what a call launched, replayed without the Python that chose it.

What an op launches follows from its key: shapes, strides, types, devices and alignment of the arguments. The first call
with a key runs as written. The second is recorded: allocations, kernels with their addresses, torch ops between them.
From the third on the plan is replayed, at a fraction of the host's time (benchmarks/gpu_model/host.py).

Never recorded: calls whose launches depend on values, and calls whose arguments share elements. Not yet recorded: a
call whose tiles are still to be timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from triton.tools.tensor_descriptor import TensorDescriptor

from ..autocast import autocast_off
from ..ops.subspace_linear_group import lie_side_by_side
from .launch import on_device, record_on, recording

aten = torch.ops.aten
_ALLOCATIONS = (aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided)
_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
#: Keys kept; beyond it all are dropped.
MOST = 4096


class Unrepeatable(Exception):
    """The call cannot be recorded."""


class Ref(NamedTuple):
    """A tensor as a place in memory: `offset` bytes from the start of the tensor in slot `slot`."""

    slot: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, slots: Sequence[Tensor]) -> Tensor:
        t = slots[self.slot]
        if t.dtype != self.dtype:
            t = t.view(self.dtype)
        if self.offset or t.shape != self.shape or t.stride() != self.stride:
            t = t.as_strided(self.shape, self.stride, t.storage_offset() + self.offset // t.itemsize)
        return t


class Empty(NamedTuple):
    """A tensor without elements: it has no address."""

    shape: torch.Size
    dtype: torch.dtype

    def of(self, slots: Sequence[Tensor]) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=slots[0].device)


class Address(NamedTuple):
    """Stands in for the tensor of a descriptor: a kernel's launcher reads its address only."""

    value: int

    def data_ptr(self) -> int:
        return self.value


# The steps of a plan work on `slots`: the live tensors, the arguments of the call first.


class Allocate(NamedTuple):
    slot: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def uses(self) -> tuple[int, ...]:
        return (self.slot,)

    def replay(self, slots: list[Tensor]) -> None:
        slots[self.slot] = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=slots[0].device)


class Release(NamedTuple):
    """Frees memory after its last use, as leaving a function does in the code that was recorded."""

    slots: tuple[int, ...]

    def replay(self, slots: list[Any]) -> None:
        for slot in self.slots:
            slots[slot] = None


@dataclass(slots=True)
class Launch:
    """A compiled kernel, which takes addresses for tensors.

    Attributes:
        start: launches it.
        arguments: with None in place of tensors.
        pointers: (argument, slot, offset in bytes).
        descriptors: (argument, slot, offset in bytes, the other fields of the TensorDescriptor).
    """

    start: Callable[..., object]
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]
    descriptors: list[tuple[int, int, int, dict[str, Any]]]

    @property
    def uses(self) -> tuple[int, ...]:
        return tuple(slot for _, slot, *_ in (*self.pointers, *self.descriptors))

    def replay(self, slots: list[Tensor]) -> None:
        arguments = self.arguments.copy()
        for i, slot, offset in self.pointers:
            arguments[i] = slots[slot].data_ptr() + offset
        for i, slot, offset, fields in self.descriptors:
            # dataclasses.replace without its checks: they depend on the key only
            arguments[i] = descriptor = object.__new__(TensorDescriptor)
            descriptor.__dict__.update(fields, base=Address(slots[slot].data_ptr() + offset))
        self.start(*arguments)


@dataclass(slots=True)
class Run:
    """A torch op, or a kernel in Triton's interpreter; both take tensors.

    Attributes:
        function: the op.
        leaves, structure: its arguments as a pytree.
        writes: whether it may write to them.
        results: (place among what it returns, slot) of each new tensor.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    structure: Any
    writes: bool
    results: list[tuple[int, int]] = field(default_factory=list)

    @property
    def uses(self) -> tuple[int, ...]:
        return (*(leaf.slot for leaf in self.leaves if isinstance(leaf, Ref)), *(slot for _, slot in self.results))

    def replay(self, slots: list[Tensor]) -> None:
        leaves = [leaf.of(slots) if isinstance(leaf, (Ref, Empty)) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        returned = self.function(*args, **kwargs)
        if self.results:
            flat = tree_flatten(returned)[0]
            for place, slot in self.results:
                slots[slot] = flat[place]


class LaunchPlan(TorchDispatchMode):
    """Records inside ``record_on(plan)``: torch ops and allocations as a mode, launches by :meth:`launch`."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.rejected = ""  # why it cannot be replayed
        self.again = False  # whether a later recording may succeed
        self._device = inputs[0].device
        self._inputs = self._count = 0
        self._steps: list[Any] = []
        self._outputs: list[Ref | Empty | list[Ref | Empty]] = []
        self._owned: list[tuple[int, int, int, Tensor]] = []  # (first byte, one past the last, slot, tensor)
        for t in inputs:
            self._inputs = self._own(t) + 1

    def reject(self, why: str, again: bool = False) -> None:
        """Give this recording up. `again`: a later one may succeed."""
        self.rejected, self.again = self.rejected or why, self.again or again

    def _own(self, t: Tensor) -> int:
        slot, self._count = self._count, self._count + 1
        if t.numel():
            extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
            # kept until the end: no address may be reused while recording
            self._owned.append((t.data_ptr(), t.data_ptr() + extent * t.itemsize, slot, t))
        return slot

    def _place(self, t: Tensor) -> tuple[int, int]:
        address = t.data_ptr()
        owners = [(slot, address - first) for first, end, slot, own in self._owned
                  if first <= address < end and _is_element(own, address - first)]  # fmt: skip
        if len(owners) != 1:
            raise Unrepeatable(
                f"no step made the tensor of shape {list(t.shape)} that a step reads"
                if not owners
                else "arguments share elements: an address does not identify one"
            )
        return owners[0]

    def _leaf(self, value: Any) -> Any:
        """An argument or a result as the plan keeps it."""
        if not isinstance(value, Tensor):
            return value
        if value.numel() == 0:
            return Empty(value.shape, value.dtype)
        return Ref(*self._place(value), value.shape, value.stride(), value.dtype)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        if not self.rejected:
            try:
                self._record(func, args, kwargs, returned)
            except Unrepeatable as error:
                self.reject(str(error))
        return returned

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        given, structure = tree_flatten((args, kwargs))
        results = [] if returned is None else tree_flatten(returned)[0]
        if _VALUES & set(func.tags) or not all(isinstance(t, Tensor) and t.device == self._device for t in results):
            raise Unrepeatable(f"what {func} returns depends on values")
        if func.overloadpacket in _ALLOCATIONS:
            self._steps.append(Allocate(self._own(returned), returned.shape, returned.stride(), returned.dtype))
            return
        storages = {t.untyped_storage()._cdata for t in given if isinstance(t, Tensor)}
        new = [i for i, t in enumerate(results) if t.untyped_storage()._cdata not in storages]
        writes = func._schema.is_mutable
        if not new and not writes:
            return  # a view: steps find it by its address
        leaves = [self._leaf(value) for value in given]
        self._steps.append(Run(func, leaves, structure, writes, [(i, self._own(results[i])) for i in new]))

    def launch(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: dict[str, Any]
    ) -> None:
        """Record a launch. `compiled`: what ``kernel[grid](*arguments, **options)`` returned."""
        if self.rejected:
            return
        try:
            if isinstance(kernel, triton.JITFunction):
                self._steps.append(self._launch(kernel, compiled, grid, arguments, options))
            else:
                described = [(a.base, a.block_shape) if isinstance(a, TensorDescriptor) else a for a in arguments]
                leaves, structure = tree_flatten((described, options))
                leaves = [self._leaf(leaf) for leaf in leaves]
                self._steps.append(Run(partial(_interpret, kernel[grid]), leaves, structure, True))
        except Unrepeatable as error:
            self.reject(str(error))

    def _launch(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: dict[str, Any]
    ) -> Launch:
        constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
        step = Launch(compiled[(*grid, 1, 1)[:3]], [*arguments, *constants], [], [])
        for i, a in enumerate(arguments):
            described = isinstance(a, TensorDescriptor)
            t = a.base if described else a
            if not isinstance(t, Tensor):
                continue
            step.arguments[i] = None
            if described:
                fields = {**vars(a), "base": None, "shape": list(a.shape), "strides": list(a.strides)}
                step.descriptors.append((i, *self._place(t), fields))
            elif t.numel():
                step.pointers.append((i, *self._place(t)))
        return step

    def end(self, outputs: Sequence[Tensor | list[Tensor]]) -> bool:
        """Close the plan after the call that returned `outputs`. Returns whether it can be replayed."""
        try:
            self._outputs = [self._leaf(o) if isinstance(o, Tensor) else [self._leaf(t) for t in o] for o in outputs]
        except Unrepeatable as error:
            self.reject(str(error))
        self._check()
        self._release()
        self._owned.clear()
        return not self.rejected

    def _check(self) -> None:
        """Reject the plan if memory that a step allocates is written outside of it.

        A compiled kernel counts as writing every tensor it takes: its signature does not say which."""
        unwritten = set()
        for step in self._steps:
            if isinstance(step, Allocate):
                unwritten |= {step.slot} if math.prod(step.shape) else set()
                continue
            if isinstance(step, Run) and not step.writes and unwritten.intersection(step.uses):
                self.reject(f"something outside the plan wrote what {step.function} reads")
            unwritten.difference_update(step.uses)
        if unwritten:
            self.reject("something outside the plan wrote what a step allocates")

    def _release(self) -> None:
        leaves = [leaf for o in self._outputs for leaf in (o if type(o) is list else [o])]
        returned = {leaf.slot for leaf in leaves if isinstance(leaf, Ref)}
        last = {slot: i for i, step in enumerate(self._steps) for slot in step.uses}
        steps = []
        for i, step in enumerate(self._steps):
            over = [slot for slot, at in last.items() if at == i and slot >= self._inputs and slot not in returned]
            steps += [step, Release(tuple(over))] if over else [step]
        self._steps = steps

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor | list[Tensor], ...]:
        """The results of the recorded call for these arguments."""
        slots: list[Any] = [*inputs, *[None] * (self._count - self._inputs)]
        for step in self._steps:
            step.replay(slots)
        return tuple(o.of(slots) if type(o) is not list else [leaf.of(slots) for leaf in o] for o in self._outputs)


def _is_element(t: Tensor, offset: int) -> bool:
    """Whether an element of `t` begins `offset` bytes behind its first."""
    left, inside = divmod(offset, t.itemsize)
    for stride, size in sorted(zip(t.stride(), t.shape), reverse=True):
        if stride:
            left -= stride * min(left // stride, size - 1)
    return left == 0 and inside == 0


def _interpret(kernel: Callable[..., object], *arguments: Any, **options: Any) -> None:
    kernel(*(TensorDescriptor.from_tensor(*a) if isinstance(a, tuple) else a for a in arguments), **options)


#: By key. False: called once; True: cannot be recorded.
_plans: dict[tuple[Any, ...], LaunchPlan | bool] = {}


def forget() -> None:
    """Drop all plans: something that they depend on beside their keys has changed."""
    _plans.clear()


def repeated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replay `function` from a plan where one can be recorded.

    Args:
        function: maps tensors, lists of tensors and values to a tuple of new tensors and lists of them; the first
            argument is a tensor or a list of tensors. What it launches must follow from its key, or from a state whose
            changes call :func:`forget`.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if recording() is not None:  # inside a call that is being recorded
            return function(*args, **kwargs)
        key, tensors = _key(function, args, kwargs)
        plan = _plans.get(key)
        if isinstance(plan, LaunchPlan):
            with on_device(tensors[0]), autocast_off(tensors[0]):
                return plan.replay(tensors)
        if plan is None:
            if len(_plans) >= MOST:
                forget()
            _plans[key] = False
        if plan is not False:
            return function(*args, **kwargs)
        plan = LaunchPlan(tensors)
        with record_on(plan):
            outputs = function(*args, **kwargs)
        if plan.end(outputs):
            _plans[key] = plan
        elif not plan.again:
            _plans[key] = True
        return outputs

    return call


def _key(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, list[Tensor]]:
    """What the launches of a call depend on, and its tensors in their order."""
    tensors: list[Tensor] = []
    deterministic = torch.are_deterministic_algorithms_enabled()  # the choice of tiles depends on it
    key: list[Any] = [function, torch.backends.cuda.matmul.fp32_precision, deterministic, *kwargs]
    for a in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(a, Tensor):
            tensors.append(a)
            key.append((a.shape, a.stride(), a.dtype, a.device, a.data_ptr() & 15))
        elif isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            tensors += a
            key.append(tuple([(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15) for t in a]))
            key.append(len(a) == 1 or lie_side_by_side(a))
        else:
            key.append(tuple(a) if isinstance(a, list) else a)
    return tuple(key), tensors
