"""Saves the adapter of a converted model.

:mod:`masm_ext.adapter.files` describes the files. Both files are written and read back first; the JSON is renamed into
place last. So the folder always holds one complete adapter, the old or the new one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base_model import BASE_ATTRIBUTE, CONFIG_ATTRIBUTE, BaseEntry, base_entries, base_tensors, check_whole
from ..config import MASMConfig
from ..contract import dtype_name
from ..conversion_report import trainable_parameters
from ..decomposition import order_of, rows_of
from ..hashing import list_hash, tensor_hashes
from ..masks import LayerMasks
from ..nn.masm_linear import MASMLinear
from ..quantized_weight import is_quantized
from ..selection import saved_modules, saved_state
from ..sharded import check_not_divided, in_first_process, reshard, whole_tensor
from ..wrappers import modules_of, unwrap, unwrapped_modules
from .files import FORMAT, FORMAT_VERSION, JSON_NAME, AdapterError, some, write_adapter
from .plan import FACTORS, plan_layers


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    masks: LayerMasks | None = None,
    config: MASMConfig | None = None,
) -> Path:
    """Save the trained part of a converted model to a folder.

    Saved: u, s, v of each layer and their initial values (so that loading needs no SVD), trained biases, all parameters
    and buffers under ``config.modules_to_save``, the masks of the layers, and the SHA-256 of every frozen parameter and
    floating-point buffer. Not saved: the frozen weights. Names are those of the unwrapped model, without the prefixes
    that ``torch.compile``, DataParallel and other wrappers add.

    Before an adapter in ``folder`` is replaced, the new one is read back and checked as :func:`load_adapter` would
    check it, against the base of this model. If anything fails, ``folder`` stays as it was.

    For a model of :func:`masm_ext.integrations.fsdp.shard` every process must call it: frozen weights are gathered one
    after another for their hashes. Process 0 writes, and the others wait for it.

    Args:
        model: a converted model, or a wrapper around it.
        folder: created if it does not exist.
        masks: not needed, since the layers hold their masks; if given, checked to belong to the layers of this model.
        config: the configuration of the conversion; None: the one that the model remembers.

    Returns:
        The path of ``adapter.json``.

    Raises:
        ValueError: the model has no MASMLinear, or has adapters of PEFT; ``config`` or ``masks`` do not match its
            layers; a trainable parameter would not be saved; a frozen tensor changed since conversion; or the adapter
            could not be loaded again. Nothing is written then.
        TypeError: ``masks`` is not a LayerMasks.
    """
    layers = modules_of(model, MASMLinear)
    if not layers:
        raise ValueError("save_adapter: the model has no MASMLinear (is it merged? unmerge it first)")
    if any(layer.is_adapter for layer in layers.values()):
        raise ValueError(
            "save_adapter: the model has adapters of PEFT: use its save_pretrained, and "
            "masm_ext.integrations.peft.peft_to_adapter for the format of save_adapter"
        )
    if masks is not None:
        _check_masks(masks, layers)
    config = _config_of(model, layers, config)
    sharded = reshard(model)
    check_not_divided((p for x in layers.values() for p in (x.u, x.s, x.v)), "save_adapter")
    modules = dict(unwrapped_modules(model))
    saved = saved_modules(modules, config.modules_to_save)
    # A frozen tensor may be divided among processes; one that learns must not be.
    state = {k: t if t.requires_grad else whole_tensor(t) for k, t in saved_state(modules, saved).items()}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for factor in FACTORS:
            tensors[f"layers.{name}.{factor}"] = getattr(layer, factor)
        if config.train_bias and layer.bias is not None:
            tensors[f"layers.{name}.bias"] = layer.bias
    tensors |= {f"saved.{name}": value for name, value in state.items()}
    for name, value in tensors.items():
        check_whole(name, value)
    _check_all_trained_are_saved(model, tensors)
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "layers": {name: _layer_entry(name, layer, config) for name, layer in layers.items()},
        "saved_modules": saved,
        "base": _base_of(model, base_tensors(modules, layers, saved, config.train_bias, sharded=True)),
        "masks": [layer.selected_mask.int().tolist() for layer in layers.values()],
    }

    def write() -> None:
        try:
            write_adapter(Path(folder), record, tensors, lambda *written: _check_loadable(*written, state))
        except AdapterError as error:
            raise ValueError(
                f"save_adapter: this model makes an adapter that cannot be loaded: {error} (if the model is sharded, "
                "gather it first)"
            ) from error

    in_first_process(write) if sharded else write()
    return Path(folder) / JSON_NAME


def _check_loadable(record: dict[str, Any], tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Plan the load of an adapter onto a description of its base: linear layers without data, and the saved state."""
    linears = {}
    for name, entry in record["layers"].items():
        (N, D), dtype = entry["shape"], getattr(torch, entry["dtype"])
        linears[name] = nn.Linear(D, N, bias=entry["bias"], device="meta", dtype=dtype)
    plan_layers(record, tensors, linears, state)


def _check_masks(masks: LayerMasks, layers: Mapping[str, MASMLinear]) -> None:
    if not isinstance(masks, LayerMasks):
        raise TypeError(f"save_adapter: masks= must be a LayerMasks, got a {type(masks).__name__}; leave it out")
    own = list(masks.layers.values())
    if [id(layer) for layer in own] != [id(layer) for layer in layers.values()]:
        raise ValueError(
            f"save_adapter: masks= was made for {len(own)} layers of another model, this one has {len(layers)} "
            f"({', '.join(list(layers)[:3])} ...); leave masks= out: the layers hold the masks in force"
        )


def _config_of(model: nn.Module, layers: Mapping[str, MASMLinear], config: MASMConfig | None) -> MASMConfig:
    """The config to save, checked against the layers."""
    stored = [m.__dict__[CONFIG_ATTRIBUTE] for _, m in unwrapped_modules(model) if CONFIG_ATTRIBUTE in m.__dict__]
    if config is None:
        config = unwrap(model).__dict__.get(CONFIG_ATTRIBUTE)
    if config is None:
        raise ValueError("save_adapter: pass the module that was given to convert(), or config=")
    for name, layer in layers.items():
        if layer.num_subspaces != config.num_subspaces:
            raise ValueError(
                f"save_adapter: config.num_subspaces is {config.num_subspaces}, but {name!r} has "
                f"{layer.num_subspaces} subspaces; pass the config that the model was converted with, or none"
            )
        if layer.lift != config.lift:
            raise ValueError(
                f"save_adapter: config.lift is {config.lift}, but {name!r} has {layer.lift}, that of a state that was "
                "loaded; pass the config that its model was converted with"
            )
        if config.energy is None and layer.ranks != config.ranks:
            raise ValueError(
                f"save_adapter: config.subspace_rank gives ranks {list(config.ranks)}, but {name!r} has "
                f"{list(layer.ranks)}; pass the config that the model was converted with, or none"
            )
    if any(other.train_bias != config.train_bias for other in stored):
        raise ValueError(
            f"save_adapter: config.train_bias is {config.train_bias}, but the model was converted with "
            f"{not config.train_bias}; pass the config that it was converted with, or none"
        )
    return config


def _check_all_trained_are_saved(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    saved = {id(t) for t in tensors.values()}
    lost = [f"{name} {list(p.shape)}" for name, p in trainable_parameters(model).items() if id(p) not in saved]
    if lost:
        raise ValueError(
            f"save_adapter: {len(lost)} trainable parameters would not be saved: {some(lost, 20)}. Name their "
            "modules in modules_to_save (for biases of converted layers: train_bias=True) before convert, or freeze "
            "them before training"
        )


def _layer_entry(name: str, layer: MASMLinear, config: MASMConfig) -> dict[str, Any]:
    if not layer.base_hash.strip("0"):
        raise ValueError(
            f"save_adapter: {name!r} does not know the weight it was made from (no base_hash), so no base could be "
            "checked on load; make it by convert() or MASMLinear.from_linear"
        )
    return {
        "offsets": list(layer.offsets),
        "energy": layer.energy,
        "directions": list(layer.directions or _directions(name, layer, config)),
        "base_sha256": layer.base_hash,
        "dtype": dtype_name(layer.base_dtype),
        "shape": [layer.out_features, layer.in_features],
        "bias": layer.bias is not None,
    }


def _directions(name: str, layer: MASMLinear, config: MASMConfig) -> list[int]:
    """The directions of a layer whose state came from another conversion: those of the config, if they are the same."""
    q = min(layer.out_features, layer.in_features)
    directions = rows_of(order_of(config.directions, q, layer.base_hash), layer.ranks, config.partition)
    if layer.directions_hash not in ("", list_hash(directions)):
        raise ValueError(
            f"save_adapter: the state that was loaded into {name!r} was made along other singular directions than "
            f"config.directions={config.directions!r} and config.partition={config.partition!r}; convert the model "
            "with the config of that state"
        )
    return directions


def _base_of(model: nn.Module, frozen: Mapping[str, Tensor]) -> dict[str, BaseEntry]:
    """The identity of the frozen tensors at conversion. Raises ValueError if one changed since."""
    at_conversion: dict[str, BaseEntry] = {}
    for name, module in unwrapped_modules(model):
        for key, entry in module.__dict__.get(BASE_ATTRIBUTE, {}).items():
            at_conversion[f"{name}.{key}" if name else key] = entry
    rounded = [name for name, value in frozen.items() if is_quantized(value)]  # by quantize(), after the conversion
    if lost := [name for name in rounded if name not in at_conversion]:
        raise ValueError(
            f"save_adapter: {some(lost)} were quantised before convert(); convert the model first, then quantize() it"
        )
    exact = {name: value for name, value in frozen.items() if name not in rounded}
    now = base_entries(exact, tensor_hashes(exact)) | {name: at_conversion[name] for name in rounded}
    now = {name: now[name] for name in frozen}
    base = {name: at_conversion.get(name, entry) for name, entry in now.items()}
    cast = [name for name, entry in now.items() if entry["dtype"] != base[name]["dtype"]]
    changed = [name for name, entry in now.items() if entry != base[name] and name not in cast]
    if changed:
        raise ValueError(
            f"save_adapter: {len(changed)} frozen tensors changed since convert(): {some(changed, 20)}. An adapter "
            "does not contain frozen tensors, so loading it would give another model. Name their modules in "
            "modules_to_save before convert, or keep the tensors fixed during training (batch norms: eval mode; "
            "weight averaging: only of the trainable parameters). If you loaded other base "
            "weights after convert() on purpose, call masm_ext.base_model.record_base(model) after loading them"
        )
    if cast:
        warnings.warn(
            f"{len(cast)} frozen tensors were cast since convert(), from {base[cast[0]]['dtype']} to "
            f"{now[cast[0]]['dtype']} ({some(cast)}): the adapter belongs to the base as it was then; whether "
            "they changed in training cannot be checked",
            stacklevel=3,
        )
    return base
