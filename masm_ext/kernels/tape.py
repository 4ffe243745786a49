"""Repeats what a call launched, without the Python that planned it.

What an op launches follows from the shapes, strides, types, devices and alignment of its arguments: from its key. The
first call with a key runs as it is written. The second is recorded: what is allocated, which kernels start with which
addresses, which torch ops run between them. From the third on the tape is played, which costs the host a fraction
(benchmarks/host.py); a model that runs eagerly waits for the host. A call whose launches depend on values, or whose
arguments share elements, is never recorded; one that is being tuned, not yet.
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
#: Keys that are kept; past it all are forgotten.
MOST = 4096


class Unrepeatable(Exception):
    """The call cannot be recorded."""


class Ref(NamedTuple):
    """A tensor as a place in memory: `offset` bytes from the start of what lies in slot number `slot`."""

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
    """A tensor without elements: it lies nowhere."""

    shape: torch.Size
    dtype: torch.dtype

    def of(self, slots: Sequence[Tensor]) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=slots[0].device)


class Address(NamedTuple):
    """What the launcher of a kernel reads of a tensor that a descriptor describes."""

    value: int

    def data_ptr(self) -> int:
        return self.value


# The steps of a tape. They work on `slots`: the tensors that live, the arguments of the call first.


class Allocate(NamedTuple):
    slot: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def uses(self) -> tuple[int, ...]:
        return (self.slot,)

    def play(self, slots: list[Tensor]) -> None:
        slots[self.slot] = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=slots[0].device)


class Release(NamedTuple):
    """Gives memory back after the last step that uses it, as the planning code does by leaving a function."""

    slots: tuple[int, ...]

    def play(self, slots: list[Any]) -> None:
        for slot in self.slots:
            slots[slot] = None


@dataclass(slots=True)
class Launch:
    """A compiled kernel, which takes addresses for tensors. `pointers`: (argument, slot, offset in bytes);
    `descriptors`: (argument, slot, offset, the other fields of the TensorDescriptor)."""

    start: Callable[..., object]
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]
    descriptors: list[tuple[int, int, int, dict[str, Any]]]

    @property
    def uses(self) -> tuple[int, ...]:
        return tuple(slot for _, slot, *_ in (*self.pointers, *self.descriptors))

    def play(self, slots: list[Tensor]) -> None:
        arguments = self.arguments.copy()
        for i, slot, offset in self.pointers:
            arguments[i] = slots[slot].data_ptr() + offset
        for i, slot, offset, fields in self.descriptors:
            # as dataclasses.replace, without the checks: the key holds what they look at
            arguments[i] = descriptor = object.__new__(TensorDescriptor)
            descriptor.__dict__.update(fields, base=Address(slots[slot].data_ptr() + offset))
        self.start(*arguments)


@dataclass(slots=True)
class Run:
    """A torch op, or a kernel in Triton's interpreter, which takes tensors. `leaves` and `structure`: its arguments as
    a pytree; `writes`: may it write to them; `results`: (place among what it returns, slot) of each new tensor."""

    function: Callable[..., Any]
    leaves: list[Any]
    structure: Any
    writes: bool
    results: list[tuple[int, int]] = field(default_factory=list)

    @property
    def uses(self) -> tuple[int, ...]:
        return (*(leaf.slot for leaf in self.leaves if isinstance(leaf, Ref)), *(slot for _, slot in self.results))

    def play(self, slots: list[Tensor]) -> None:
        leaves = [leaf.of(slots) if isinstance(leaf, (Ref, Empty)) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        returned = self.function(*args, **kwargs)
        if self.results:
            flat = tree_flatten(returned)[0]
            for place, slot in self.results:
                slots[slot] = flat[place]


class Tape(TorchDispatchMode):
    """Records inside ``record_on(tape)``: torch ops and allocations as a mode, launches by :meth:`launch`."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.spoiled = ""  # why it cannot be played
        self.again = False  # whether the next recording may be better
        self._device = inputs[0].device
        self._inputs = self._count = 0
        self._steps: list[Any] = []
        self._outputs: list[Ref | Empty | list[Ref | Empty]] = []
        self._owned: list[tuple[int, int, int, Tensor]] = []  # (first byte, one past the last, slot, tensor)
        for t in inputs:
            self._inputs = self._own(t) + 1

    def spoil(self, why: str, again: bool = False) -> None:
        """This recording is of no use. `again`: the next may be."""
        self.spoiled, self.again = self.spoiled or why, self.again or again

    def _own(self, t: Tensor) -> int:
        slot, self._count = self._count, self._count + 1
        if t.numel():
            extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
            # kept until the end, so that no address is given away twice
            self._owned.append((t.data_ptr(), t.data_ptr() + extent * t.itemsize, slot, t))
        return slot

    def _place(self, t: Tensor) -> tuple[int, int]:
        address = t.data_ptr()
        owners = [(slot, address - first) for first, end, slot, own in self._owned
                  if first <= address < end and _is_element(own, address - first)]  # fmt: skip
        if len(owners) != 1:
            raise Unrepeatable(
                f"no step made a tensor of shape {list(t.shape)} that is read"
                if not owners
                else "arguments share elements: an address does not tell which is meant"
            )
        return owners[0]

    def _leaf(self, value: Any) -> Any:
        """What stands on the tape for an argument or a result."""
        if not isinstance(value, Tensor):
            return value
        if value.numel() == 0:
            return Empty(value.shape, value.dtype)
        return Ref(*self._place(value), value.shape, value.stride(), value.dtype)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        if not self.spoiled:
            try:
                self._record(func, args, kwargs, returned)
            except Unrepeatable as error:
                self.spoil(str(error))
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
            return  # a view, which its address will tell
        leaves = [self._leaf(value) for value in given]
        self._steps.append(Run(func, leaves, structure, writes, [(i, self._own(results[i])) for i in new]))

    def launch(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: dict[str, Any]
    ) -> None:
        """`compiled`: what ``kernel[grid](*arguments, **options)`` gave."""
        if self.spoiled:
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
            self.spoil(str(error))

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
        """Close the tape after the call that returned `outputs`. Can it be played?"""
        try:
            self._outputs = [self._leaf(o) if isinstance(o, Tensor) else [self._leaf(t) for t in o] for o in outputs]
        except Unrepeatable as error:
            self.spoil(str(error))
        self._check()
        self._release()
        self._owned.clear()
        return not self.spoiled

    def _check(self) -> None:
        """Was all that the steps allocate written by them? As far as can be told: nobody says what a compiled kernel
        writes of that which it is given."""
        unwritten = set()
        for step in self._steps:
            if isinstance(step, Allocate):
                unwritten |= {step.slot} if math.prod(step.shape) else set()
                continue
            if isinstance(step, Run) and not step.writes and unwritten.intersection(step.uses):
                self.spoil(f"something that is not on the tape wrote what {step.function} reads")
            unwritten.difference_update(step.uses)
        if unwritten:
            self.spoil("something that is not on the tape wrote what a step allocates")

    def _release(self) -> None:
        leaves = [leaf for o in self._outputs for leaf in (o if type(o) is list else [o])]
        returned = {leaf.slot for leaf in leaves if isinstance(leaf, Ref)}
        last = {slot: i for i, step in enumerate(self._steps) for slot in step.uses}
        steps = []
        for i, step in enumerate(self._steps):
            over = [slot for slot, at in last.items() if at == i and slot >= self._inputs and slot not in returned]
            steps += [step, Release(tuple(over))] if over else [step]
        self._steps = steps

    def play(self, inputs: Sequence[Tensor]) -> tuple[Tensor | list[Tensor], ...]:
        """What the recorded call returned, for these arguments."""
        slots: list[Any] = [*inputs, *[None] * (self._count - self._inputs)]
        for step in self._steps:
            step.play(slots)
        return tuple(o.of(slots) if type(o) is not list else [leaf.of(slots) for leaf in o] for o in self._outputs)


def _is_element(t: Tensor, offset: int) -> bool:
    """Does an element of `t` begin `offset` bytes behind its first?"""
    left, inside = divmod(offset, t.itemsize)
    for stride, size in sorted(zip(t.stride(), t.shape), reverse=True):
        if stride:
            left -= stride * min(left // stride, size - 1)
    return left == 0 and inside == 0


def _interpret(kernel: Callable[..., object], *arguments: Any, **options: Any) -> None:
    kernel(*(TensorDescriptor.from_tensor(*a) if isinstance(a, tuple) else a for a in arguments), **options)


_tapes: dict[tuple[Any, ...], Tape | bool] = {}  # False: called once; True: never to be recorded


def forget() -> None:
    """Drop all tapes: something that plans depend on beside their keys has changed."""
    _tapes.clear()


def repeated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Play `function` from a tape where it can. It maps tensors, lists of tensors and values to a tuple of new tensors
    and lists of them; what it launches must follow from its key, or from what calls :func:`forget` when it changes. The
    first argument is, or begins with, a tensor."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if recording() is not None:  # a part of the call that is being recorded
            return function(*args, **kwargs)
        key, tensors = _key(function, args, kwargs)
        tape = _tapes.get(key)
        if isinstance(tape, Tape):
            with on_device(tensors[0]), autocast_off(tensors[0]):
                return tape.play(tensors)
        if tape is None:
            if len(_tapes) >= MOST:
                forget()
            _tapes[key] = False
        if tape is not False:
            return function(*args, **kwargs)
        tape = Tape(tensors)
        with record_on(tape):
            outputs = function(*args, **kwargs)
        if tape.end(outputs):
            _tapes[key] = tape
        elif not tape.again:
            _tapes[key] = True
        return outputs

    return call


def _key(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, list[Tensor]]:
    """What the plan of a call depends on, and its tensors in their order."""
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
