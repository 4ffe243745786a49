"""Divides the frozen weights of a converted model among processes; what learns is in every process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ...contract import HALF
from ...nn.masm_linear import MASMLinear
from ...quantized_weight import is_quantized
from ...wrappers import modules_of
from .gradients import GradientAverage

#: Options of fully_shard that :func:`shard` sets itself.
_OWN = ("ignored_params", "shard_placement_fn", "dp_mesh_dims")


def shard(
    model: nn.Module, mesh: DeviceMesh | None = None, *, units: Sequence[nn.Module] | None = None, **options: Any
) -> nn.Module:
    """Shard a converted model by ``fully_shard`` (FSDP2), in place.

    The frozen weights are divided among the processes: a process holds its part, and gathers those of a unit while the
    unit runs. ``principal`` of each layer becomes a frozen parameter for that; its name in the state_dict stays. The
    parameters that learn are few, and a block of :class:`masm_ext.LayerMasks` must not be divided: every process holds
    all of them, and their gradients are averaged when a backward pass ends. So every process makes the same step, and
    :class:`masm_ext.MaskedAdamW` and its masks work as in one process.

    Call it after ``convert`` or ``load_adapter``, with the model on the device of the mesh, before the optimizer is
    made. At the start every process gets the values of the first one. ``model.set_requires_gradient_sync(False)``
    accumulates gradients without communication. With a ``MixedPrecisionPolicy`` the frozen weights are gathered in its
    ``param_dtype``; parameters that learn keep their dtype, and so do the products in which they take part.
    ``output_dtype`` is that of the model, not of every unit; ``reduce_dtype`` has no effect.

    The penalties gather the frozen weight of one layer at a time. ``save_adapter``, ``relative_update`` and
    ``folded_weight`` gather too: call them in every process.

    Args:
        model: a converted model.
        mesh: 1 dimension: shard among all processes; 2 dimensions with names: shard along the second, replicate along
            the first. None: all processes of the default group.
        units: modules that are gathered one at a time, in module order; None: the elements of every
            ``nn.ModuleList`` and ``nn.Sequential`` that hold a MASMLinear (the blocks of a transformer). The weights
            outside them are gathered with the model.
        options: of ``fully_shard``: ``mp_policy``, ``reshard_after_forward``, ``offload_policy``.

    Returns:
        The model, whose class is now also ``FSDPModule``.

    Raises:
        ValueError: the model is not converted, is sharded already, has quantized layers or adapters of PEFT, or is not
            on the device of the mesh; or an option that this function sets.
    """
    layers = modules_of(model, MASMLinear)
    if mesh is None:
        mesh = init_device_mesh(_default_device(), (dist.get_world_size(),))
    _check(model, layers, mesh, options)
    learning = [p for p in model.parameters() if p.requires_grad]
    for tensor in (*model.parameters(), *model.buffers()):
        _broadcast(tensor, mesh)
    for layer in layers.values():
        frozen = layer._buffers.pop("principal")
        layer.register_parameter("principal", nn.Parameter(frozen, requires_grad=False))
    own = options | {"mesh": mesh, "ignored_params": set(learning)}
    of_unit = dict(own)
    if "mp_policy" in own:
        of_unit["mp_policy"] = replace(own["mp_policy"], output_dtype=None)
    for unit in _blocks(model) if units is None else units:
        if unit is not model:
            fully_shard(unit, **of_unit)
    # As fully_shard's own default: the root is needed again at once in the backward pass.
    fully_shard(model, **{k: v for k, v in own.items() if k != "reshard_after_forward"})
    for module in model.modules():
        direct = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if direct and not isinstance(module, MASMLinear):
            module.register_forward_pre_hook(partial(_to_own_dtype, direct[0]), with_kwargs=True)
            module.register_forward_hook(_to_dtype_of_input)
    average = GradientAverage(learning, mesh)
    model.__dict__["gradient_average"] = average
    _synchronize_with(model, average)
    return model


def _default_device() -> str:
    backend = dist.get_backend()
    return "cuda" if "nccl" in backend else "cpu"


def _check(model: nn.Module, layers: dict[str, MASMLinear], mesh: DeviceMesh, options: dict[str, Any]) -> None:
    if not layers:
        raise ValueError("shard: the model has no MASMLinear; call convert(model, config) first")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("shard: the model is sharded already; call shard on the converted model, without fully_shard")
    refused = sorted(set(options) & set(_OWN))
    if refused:
        raise ValueError(f"shard: {refused} are set by shard itself; leave them out")
    for name, layer in layers.items():
        if layer.is_adapter:
            raise ValueError(f"shard: {name!r} is an adapter of PEFT; shard takes a model of convert or load_adapter")
        if is_quantized(layer.principal):
            raise ValueError(f"shard: the weight of {name!r} is quantized and cannot be divided; leave out quantize()")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != mesh.device_type:
            raise ValueError(
                f"shard: {name} is on {tensor.device.type}, the mesh on {mesh.device_type}; move the model there first"
            )


def _broadcast(tensor: Tensor, mesh: DeviceMesh) -> None:
    """The values of the first process of the mesh, in all."""
    data = tensor.detach()
    sent = data.contiguous()
    for dimension in range(mesh.ndim):
        dist.broadcast(sent, group=mesh.get_group(dimension), group_src=0)
    if sent is not data:
        data.copy_(sent)


def _blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The innermost elements of lists of modules that hold MASMLinears, in module order."""
    found = [
        child
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for child in module
        if any(isinstance(m, MASMLinear) for m in child.modules())
    ]
    # fully_shard refuses containers without a forward.
    return [
        block
        for block in dict.fromkeys(found)
        if not isinstance(block, nn.ModuleList) and not any(m in found for m in list(block.modules())[1:])
    ]


def _to_own_dtype(parameter: nn.Parameter, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Inputs in the dtype of a parameter that learns: a policy of mixed precision casts the frozen weights only."""
    module.__dict__["dtype_of_input"] = None
    if torch.is_autocast_enabled(parameter.device.type):
        return args, kwargs
    dtypes = [a.dtype for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]
    if not dtypes or dtypes[0] == parameter.dtype or not {dtypes[0], parameter.dtype} & set(HALF):
        return args, kwargs
    module.__dict__["dtype_of_input"] = dtypes[0]

    def cast(a: Any) -> Any:
        return a.to(parameter.dtype) if isinstance(a, Tensor) and a.is_floating_point() else a

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


def _to_dtype_of_input(module: nn.Module, args: tuple, output: Any) -> Any:
    dtype = module.__dict__.pop("dtype_of_input", None)
    if dtype is None or not isinstance(output, Tensor) or not output.is_floating_point():
        return output
    return output.to(dtype)


def _synchronize_with(model: nn.Module, average: GradientAverage) -> None:
    """Make ``model.set_requires_gradient_sync`` switch the averaging, too."""
    switch = model.set_requires_gradient_sync

    def set_requires_gradient_sync(requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        switch(requires_gradient_sync, recurse=recurse)
        average.enabled = requires_gradient_sync

    model.__dict__["set_requires_gradient_sync"] = set_requires_gradient_sync
