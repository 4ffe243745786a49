"""Adapters on disk: what was learned, and what rebuilds the model from its pretrained base without an SVD.

:mod:`masm_ext.adapter_files` describes the files. The JSON is renamed into place last, and only after both files were
read back: a folder always holds one complete adapter, old or new.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_files import (
    FORMAT,
    FORMAT_VERSION,
    AdapterError,
    read_record,
    read_tensors,
    write_adapter,
)
from .base_model import BASE_ATTRIBUTE, CONFIG_ATTRIBUTE, BaseEntry, base_entries, base_tensors, check_whole
from .config import MASMConfig
from .contract import accumulate_dtype
from .conversion_report import ConversionReport, trainable_parameters
from .convert import replace_layers
from .decomposition import Decomposition, principal
from .hashing import tensor_hashes
from .masks import LayerMasks
from .nn.masm_linear import ANY_STEP, MASMLinear
from .selection import check_convertible, is_under, saved_modules, saved_state
from .wrappers import modules_of, unwrap, unwrapped_modules

_FACTORS = ("u", "s", "v", "u0", "s0", "v0")


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    masks: LayerMasks | None = None,
    config: MASMConfig | None = None,
) -> Path:
    """Write the learned part of a converted model to ``folder``; returns the path of its ``adapter.json``.

    Saved: u, s, v and their initial values per layer (so that loading needs no SVD), trained biases, all parameters and
    buffers under ``config.modules_to_save``, the masks of the layers, and the SHA-256 of every frozen parameter and
    floating-point buffer of the base. Not saved: the frozen weights. Names are those of the unwrapped model
    (``torch.compile``, DataParallel and others add parts to names, which an adapter does not have).

    What was written is read back and checked as :func:`load_adapter` would, against the base that the model was
    converted from, before it replaces an adapter in ``folder``. If anything fails, ``folder`` is left as it was.

    Args:
        model: a converted model, or a wrapper around it.
        folder: made if it does not exist.
        masks: not needed, the layers hold their masks; if given, it must be made for the layers of this model.
        config: the one the model was converted with, by default.

    Raises ValueError, before anything is written, if the model has no MASMLinear, ``masks`` or ``config`` are not those
    of its layers, a trainable parameter would not be saved, or a frozen tensor is not what it was at conversion.
    """
    layers = modules_of(model, MASMLinear)
    if not layers:
        raise ValueError("save_adapter: the model has no MASMLinear (is it merged? unmerge it first)")
    if masks is not None:
        _check_masks(masks, layers)
    config = _config_of(model, layers, config)
    modules = dict(unwrapped_modules(model))
    saved = saved_modules(modules, config.modules_to_save)
    state = saved_state(modules, saved)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for factor in _FACTORS:
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
        "layers": {name: _layer_entry(name, layer) for name, layer in layers.items()},
        "saved_modules": saved,
        "base": _base_of(model, base_tensors(modules, layers, saved, config.train_bias)),
        "masks": [layer.selected_mask.int().tolist() for layer in layers.values()],
    }
    try:
        return write_adapter(Path(folder), record, tensors, lambda *written: _check_loadable(*written, state))
    except AdapterError as error:
        raise ValueError(
            f"save_adapter: this model makes an adapter that cannot be loaded: {error} (if the model is sharded, "
            "gather it first)"
        ) from error


def _check_loadable(record: dict[str, Any], tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Plan the load of an adapter onto a description of its base: linear layers without data, and the saved state."""
    linears = {}
    for name, entry in record["layers"].items():
        (N, D), dtype = entry["shape"], getattr(torch, entry["dtype"])
        linears[name] = nn.Linear(D, N, bias=entry["bias"], device="meta", dtype=dtype)
    _plan(record, tensors, linears, state)


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
            f"save_adapter: {len(lost)} trainable parameters would not be saved: {_some(lost, 20)}. Name their "
            "modules in modules_to_save (for biases of converted layers: train_bias=True) before convert, or freeze "
            "them before training"
        )


def _layer_entry(name: str, layer: MASMLinear) -> dict[str, Any]:
    if not layer.base_hash.strip("0"):
        raise ValueError(
            f"save_adapter: {name!r} does not know the weight it was made from (no base_hash), so no base could be "
            "checked on load; make it by convert() or MASMLinear.from_linear"
        )
    return {
        "offsets": list(layer.offsets),
        "energy": layer.energy,
        "base_sha256": layer.base_hash,
        "dtype": _dtype(layer.base_dtype),
        "shape": [layer.out_features, layer.in_features],
        "bias": layer.bias is not None,
    }


def _base_of(model: nn.Module, frozen: Mapping[str, Tensor]) -> dict[str, BaseEntry]:
    """The identity of the frozen tensors at conversion. Raises ValueError if one changed since."""
    at_conversion: dict[str, BaseEntry] = {}
    for name, module in unwrapped_modules(model):
        for key, entry in module.__dict__.get(BASE_ATTRIBUTE, {}).items():
            at_conversion[f"{name}.{key}" if name else key] = entry
    now = base_entries(frozen, tensor_hashes(frozen))
    base = {name: at_conversion.get(name, entry) for name, entry in now.items()}
    cast = [name for name, entry in now.items() if entry["dtype"] != base[name]["dtype"]]
    changed = [name for name, entry in now.items() if entry != base[name] and name not in cast]
    if changed:
        raise ValueError(
            f"save_adapter: {len(changed)} frozen tensors changed since convert(): {_some(changed, 20)}. An adapter "
            "does not carry them, so the loaded model would be another one. Name their modules in modules_to_save "
            "before convert, or keep them as they are in training (batch norms: in eval mode; averages made by hand: "
            "of the trainable parameters only). Where other base "
            "weights were loaded on purpose after convert(), call masm_ext.base_model.record_base(model) then"
        )
    if cast:
        warnings.warn(
            f"{len(cast)} frozen tensors were cast since convert(), from {base[cast[0]]['dtype']} to "
            f"{now[cast[0]]['dtype']} ({_some(cast)}): the adapter belongs to the base as it was then; whether "
            "they changed in training cannot be checked",
            stacklevel=3,
        )
    return base


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> ConversionReport:
    """Convert a pretrained, not yet converted model with a saved adapter, in place. No SVD is computed.

    The model may be wrapped (``torch.compile``, DataParallel); layers are found by their names in the unwrapped model.

    Raises AdapterError if the file is damaged or of a newer format, if a layer is missing or cannot be converted
    (what :func:`masm_ext.convert` refuses), if a frozen parameter or buffer of the model is not that of the base the
    adapter was trained on (by hash), or if keys are missing or left over; FileNotFoundError if there is no adapter.
    The model is changed only after everything has been checked.

    Adapters of format version 1 are bound to the weights of the converted layers only; a warning says so.
    """
    folder = Path(folder)
    record = read_record(folder)
    tensors = read_tensors(folder / record["tensors"]["file"], record)
    if modules_of(model, MASMLinear):
        raise AdapterError("load_adapter expects the pretrained model before conversion; this one is converted already")
    modules = dict(unwrapped_modules(model))
    linears: dict[str, nn.Linear] = {}
    for name in record["layers"]:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = type(linear).__name__ if linear is not None else "nothing"
            raise AdapterError(
                f"the adapter converts {name!r}, where this model has {found}: it is another architecture"
            )
        linears[name] = linear
    config = MASMConfig.from_dict(record["config"])
    try:
        check_convertible(model, linears)
        saved = _saved_names(record, modules, config)
        frozen = base_tensors(modules, linears, saved, config.train_bias)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"the adapter does not fit this model: {error}") from error
    state = saved_state(modules, saved)
    plans = _plan(record, tensors, linears, state)
    base = _check_base(record, linears, frozen)
    built = {name: plan.build(linears[name], config) for name, plan in plans.items()}
    values = {name: tensors[f"saved.{name}"] for name in state}
    return replace_layers(model, config, linears, built, saved, base, values)


def _saved_names(record: dict[str, Any], modules: Mapping[str, nn.Module], config: MASMConfig) -> list[str]:
    if record["format_version"] == 1:
        return saved_modules(modules, config.modules_to_save, exact_first=False)
    missing = [name for name in record["saved_modules"] if name not in modules]
    if missing:
        raise ValueError(f"it holds the modules {_some(missing)}, which this model lacks")
    return record["saved_modules"]


def _check_base(
    record: dict[str, Any], linears: Mapping[str, nn.Linear], frozen: Mapping[str, Tensor]
) -> dict[str, BaseEntry]:
    """Compare a plain model with the base of an adapter; returns the entries of its frozen tensors."""
    weights = {f"{name}.weight": linear.weight for name, linear in linears.items()}
    bound = {f"{n}.weight": {**e, "sha256": e["base_sha256"]} for n, e in record["layers"].items()}
    if record["base"] is None:
        warnings.warn(
            "this adapter has format version 1, which is bound to the weights of the converted layers only: whether "
            "the other weights are those of its base is not checked; save it again to bind it to all of them",
            stacklevel=3,
        )
    else:
        missing, more = sorted(set(record["base"]) - set(frozen)), sorted(set(frozen) - set(record["base"]))
        if missing or more:
            raise AdapterError(
                f"base model does not fit the adapter: it lacks {len(missing)} tensors of the adapter's base "
                f"({_some(missing)}) and has {len(more)} that the base had not ({_some(more)}): another architecture"
            )
        bound |= record["base"]
    present = weights | dict(frozen)
    for name, entry in bound.items():
        found = present[name]
        if _dtype(found.dtype) != entry["dtype"]:
            raise AdapterError(
                f"base model does not fit the adapter: {name} is {_dtype(found.dtype)}, the adapter's base was "
                f"{entry['dtype']}; load the base in it"
            )
        if list(found.shape) != (entry["shape"] or list(found.shape)):
            raise AdapterError(
                f"base model does not fit the adapter: {name} has shape {list(found.shape)}, in the adapter's base "
                f"{entry['shape']}"
            )
    hashes = tensor_hashes(present)
    other = [name for name, entry in bound.items() if hashes[name] != entry["sha256"]]
    if other:
        raise AdapterError(
            f"base model does not fit the adapter: {len(other)} of its tensors differ from those the adapter was "
            f"trained on ({_some(other)}); use the same pretrained checkpoint"
        )
    return base_entries(frozen, hashes)


@dataclass(frozen=True)
class _LayerPlan:
    """What one MASMLinear is made of beside the weight and the bias of the base."""

    factors: dict[str, Tensor]
    offsets: tuple[int, ...]
    energy: float
    base_hash: str
    bias: Tensor | None
    mask: Tensor | None

    def build(self, linear: nn.Linear, config: MASMConfig) -> MASMLinear:
        device = linear.weight.device
        dtype = accumulate_dtype(linear.weight.dtype)
        u0, s0, v0 = (self.factors[f].to(device, dtype) for f in ("u0", "s0", "v0"))
        parts = Decomposition(principal(linear.weight.detach(), u0, s0, v0), u0, s0, v0, self.offsets, self.energy)
        layer = MASMLinear(parts, linear.bias, base_hash=self.base_hash, train_bias=config.train_bias)
        with torch.no_grad():
            for factor in ("u", "s", "v"):
                getattr(layer, factor).copy_(self.factors[factor])
            if self.bias is not None:
                layer.bias.copy_(self.bias)
            if self.mask is not None:
                layer.mask.copy_(self.mask)
        layer.restored_steps = ANY_STEP
        return layer


def _plan(
    record: dict[str, Any],
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, nn.Linear],
    state: Mapping[str, Tensor],
) -> dict[str, _LayerPlan]:
    """Check an adapter against the layers and the saved state that it is to be put on, of which only names, shapes and
    dtypes are read. Raises AdapterError.
    """
    config = MASMConfig.from_dict(record["config"])
    inside = [name for name in linears if record["saved_modules"] and is_under(name, record["saved_modules"])]
    if inside:
        raise AdapterError(f"{inside[0]!r} is converted and lies under modules_to_save; it can only be one of these")
    expected: dict[str, list[int]] = {f"saved.{name}": list(value.shape) for name, value in state.items()}
    for name, linear in linears.items():
        entry, (N, D), R = record["layers"][name], linear.weight.shape, record["layers"][name]["offsets"][-1]
        if min(N, D) < R:
            raise AdapterError(f"{name}: the adapter has {R} directions, the layer only {min(N, D)}")
        if entry["bias"] not in (None, linear.bias is not None):
            had, has = ("a bias", "none") if entry["bias"] else ("no bias", "one")
            raise AdapterError(f"{name}: the adapter's base had {had}, this model has {has}: another architecture")
        for suffix in ("", "0"):
            shapes = {f"u{suffix}": [R, N], f"s{suffix}": [R], f"v{suffix}": [R, D]}
            expected |= {f"layers.{name}.{factor}": shape for factor, shape in shapes.items()}
        if config.train_bias and linear.bias is not None:
            expected[f"layers.{name}.bias"] = [N]
    _check_keys(set(expected), set(tensors))
    for name, shape in expected.items():
        value = tensors[name]
        if list(value.shape) != shape:
            raise AdapterError(f"{name}: expected shape {shape}, the adapter holds {list(value.shape)}")
        floating = state[name[6:]].is_floating_point() if name.startswith("saved.") else True
        if value.is_floating_point() != floating:
            kind = "a floating-point" if floating else "an integer"
            raise AdapterError(f"{name}: expected {kind} tensor, the adapter holds {_dtype(value.dtype)}")
    masks = record["masks"] or [None] * len(record["layers"])
    rows = dict(zip(record["layers"], masks))
    return {
        name: _LayerPlan(
            {factor: tensors[f"layers.{name}.{factor}"] for factor in _FACTORS},
            tuple(record["layers"][name]["offsets"]),
            record["layers"][name]["energy"],
            record["layers"][name]["base_sha256"],
            tensors.get(f"layers.{name}.bias"),
            None if rows[name] is None else torch.tensor(rows[name]) != 0,
        )
        for name in linears
    }


def _check_keys(expected: set[str], got: set[str]) -> None:
    missing, left_over = sorted(expected - got), sorted(got - expected)
    if missing or left_over:
        raise AdapterError(
            f"the adapter's tensors do not fit: "
            f"{len(missing)} missing {missing[:3]}, {len(left_over)} unexpected {left_over[:3]}"
        )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: Collection[str], most: int = 3) -> str:
    """The first of some names, for a message."""
    shown = ", ".join(list(names)[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
