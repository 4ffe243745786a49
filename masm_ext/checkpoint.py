"""Adapters on disk: what was learned, and what rebuilds the model from its pretrained base without an SVD.

A folder with ``adapter.json`` (format version, config, layers, hashes, masks) and one safetensors file that it names.
The JSON is renamed into place last, so that a folder is always one complete adapter, old or new.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .config import MASMConfig
from .contract import accumulate_dtype
from .convert import CONFIG_ATTRIBUTE, ConversionReport, replace_layers
from .decomposition import Decomposition, principal, weight_hash
from .files import write_atomically
from .masking import LayerMasks
from .nn.masm_linear import MASMLinear, masm_layers
from .selection import matches

FORMAT = "masm_ext adapter"
FORMAT_VERSION = 1
JSON_NAME = "adapter.json"
_FACTORS = ("u", "s", "v", "u0", "s0", "v0")


class AdapterError(ValueError):
    """An adapter that cannot be loaded: another base model, a damaged file, a newer format."""


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    masks: LayerMasks | None = None,
    config: MASMConfig | None = None,
) -> Path:
    """Write the learned part of a converted model to ``folder``; returns the path of its ``adapter.json``.

    Saved: u, s, v and their initial values per layer (so that loading needs no SVD), trained biases, all parameters and
    buffers under ``config.modules_to_save``, the masks, and the hash of each base weight. Not saved: the frozen
    weights.

    ``config`` is the one the model was converted with, by default. Raises ValueError if the model has no MASMLinear.
    """
    layers = masm_layers(model)
    if not layers:
        raise ValueError("save_adapter: the model has no MASMLinear (is it merged? unmerge it first)")
    config = config or getattr(model, CONFIG_ATTRIBUTE, None)
    if config is None:
        raise ValueError("save_adapter: pass the module that was given to convert(), or config=")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for factor in _FACTORS:
            tensors[f"layers.{name}.{factor}"] = getattr(layer, factor)
        if config.train_bias and layer.bias is not None:
            tensors[f"layers.{name}.bias"] = layer.bias
    for name, value in _saved_modules(model, config).items():
        tensors[f"saved.{name}"] = value
    tensors = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    file_name = f"adapter-{digest[:12]}.safetensors"
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "tensors": {"file": file_name, "sha256": digest},
        "layers": {
            name: {
                "offsets": list(layer.offsets),
                "energy": layer.energy,
                "base_sha256": layer.base_hash,
                "dtype": str(layer.base_dtype).removeprefix("torch."),
            }
            for name, layer in layers.items()
        },
        "masks": masks.masks.tolist() if masks is not None else None,
    }
    record["sha256"] = _digest(record)
    replaced = _tensors_named_by(folder / JSON_NAME)
    write_atomically(folder / file_name, data)
    write_atomically(folder / JSON_NAME, json.dumps(record, indent=1).encode())
    if replaced is not None and replaced != file_name:
        (folder / replaced).unlink(missing_ok=True)
    return folder / JSON_NAME


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> ConversionReport:
    """Convert a pretrained, not yet converted model with a saved adapter, in place. No SVD is computed.

    Raises AdapterError if the file is damaged or of a newer format, if a layer is missing or its weights are not those
    the adapter was trained on (by hash), or if keys are missing or left over; FileNotFoundError if there is no adapter.
    The model is changed only after everything has been checked.
    """
    folder = Path(folder)
    record = read_record(folder)
    tensors = _read_tensors(folder, record)
    config = MASMConfig.from_dict(record["config"])
    if masm_layers(model):
        raise AdapterError("load_adapter expects the pretrained model before conversion; this one is converted already")
    modules = dict(model.named_modules())
    linears: dict[str, nn.Linear] = {}
    for name in record["layers"]:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = type(linear).__name__ if linear is not None else "nothing"
            raise AdapterError(
                f"the adapter converts {name!r}, where this model has {found}: it is another architecture"
            )
        linears[name] = linear
    # hashing is most of the time, and does not hold the interpreter lock
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        hashes = pool.map(weight_hash, (linear.weight for linear in linears.values()))
        for (name, linear), found in zip(linears.items(), hashes):
            entry = record["layers"][name]
            if found != entry["base_sha256"]:
                dtype = str(linear.weight.dtype).removeprefix("torch.")
                why = (
                    f"its weights are {dtype}, the adapter's base was {entry['dtype']}; load the base in that dtype"
                    if dtype != entry["dtype"]
                    else "its weights differ from those the adapter was trained on; use the same pretrained checkpoint"
                )
                raise AdapterError(f"base model does not fit the adapter at {name!r}: {why}")

    expected = {f"layers.{name}.{f}" for name in linears for f in _FACTORS}
    if config.train_bias:
        expected |= {f"layers.{name}.bias" for name, layer in linears.items() if layer.bias is not None}
    saved = _saved_modules(model, config)
    expected |= {f"saved.{name}" for name in saved}
    _check_keys(expected, set(tensors))
    for name, value in saved.items():
        if tensors[f"saved.{name}"].shape != value.shape:
            raise AdapterError(
                f"{name}: the adapter holds shape {list(tensors[f'saved.{name}'].shape)}, the model {list(value.shape)}"
            )

    def build(name: str, linear: nn.Linear) -> MASMLinear:
        entry = record["layers"][name]
        device = linear.weight.device
        dtype = accumulate_dtype(linear.weight.dtype)
        u0, s0, v0 = (tensors[f"layers.{name}.{f}"].to(device, dtype) for f in ("u0", "s0", "v0"))
        N, D = linear.weight.shape
        R = entry["offsets"][-1]
        if (u0.shape, s0.shape, v0.shape) != ((R, N), (R,), (R, D)):
            raise AdapterError(
                f"{name}: expected u0 [R, N] = [{R}, {N}], s0 [{R}] and v0 [{R}, {D}], got {list(u0.shape)}, "
                f"{list(s0.shape)} and {list(v0.shape)}"
            )
        weight = principal(linear.weight.detach(), u0, s0, v0)
        parts = Decomposition(weight, u0, s0, v0, tuple(entry["offsets"]), entry["energy"])
        layer = MASMLinear(parts, linear.bias, base_hash=entry["base_sha256"], train_bias=config.train_bias)
        with torch.no_grad():
            for factor in ("u", "s", "v", *(("bias",) if config.train_bias and layer.bias is not None else ())):
                value = tensors[f"layers.{name}.{factor}"]
                if value.shape != getattr(layer, factor).shape:
                    raise AdapterError(f"{name}.{factor}: unexpected shape {list(value.shape)}")
                getattr(layer, factor).copy_(value)
        return layer

    report = replace_layers(model, config, linears, build)
    with torch.no_grad():
        for name, value in _saved_modules(model, config).items():
            value.copy_(tensors[f"saved.{name}"])
    if record["masks"] is not None:
        layers = masm_layers(model)
        for name, row in zip(record["layers"], record["masks"]):
            layers[name].mask.copy_(torch.tensor(row) != 0)
    return report


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """The checked content of ``adapter.json``: config, layers, hashes, masks."""
    path = Path(folder) / JSON_NAME
    if not path.exists():
        raise FileNotFoundError(f"no adapter in {folder}: {JSON_NAME} is missing")
    try:
        record = json.loads(path.read_bytes())
        version = record["format_version"]
        if record["format"] != FORMAT or not isinstance(version, int) or version < 1:
            raise ValueError(f"format {record['format']!r}, version {version!r}: not an adapter of masm_ext")
        if version > FORMAT_VERSION:
            raise AdapterError(
                f"{path} has format version {version}, this masm_ext reads up to {FORMAT_VERSION}: upgrade masm_ext"
            )
        if record["sha256"] != _digest(record):
            raise ValueError("its content is not what was written (SHA-256)")
        config = MASMConfig.from_dict(record["config"])
        K, masks = config.num_subspaces, record["masks"]
        if masks is not None and [len(row) for row in masks] != [K] * len(record["layers"]):
            raise ValueError("masks do not have the shape [L, K]")
        for name, entry in record["layers"].items():
            offsets, known = entry["offsets"], {"base_sha256", "dtype", "energy"} <= set(entry)
            if not known or len(offsets) != K + 1 or offsets[0] != 0 or offsets != sorted(offsets):
                raise ValueError(f"layer {name!r} is incomplete or has wrong offsets")
        if Path(record["tensors"]["file"]).name != record["tensors"]["file"]:
            raise ValueError(f"it names a file outside its folder: {record['tensors']['file']!r}")
        record["tensors"]["sha256"]
    except AdapterError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AdapterError(f"{path} is damaged or was changed: {error!r}") from error
    return record


def _digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its own digest."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _tensors_named_by(path: Path) -> str | None:
    """The tensor file of the adapter that is about to be replaced, if there is a readable one."""
    try:
        name = json.loads(path.read_bytes())["tensors"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and Path(name).name == name and name.startswith("adapter-") else None


def _read_tensors(folder: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    name = record["tensors"]["file"]
    path = folder / name
    if not path.exists():
        raise AdapterError(f"{path} is missing: the adapter is incomplete")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record["tensors"]["sha256"]:
        raise AdapterError(f"{path} is truncated or was changed: its SHA-256 is not the one in {JSON_NAME}")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path} is no valid safetensors file: {error}") from error


def _saved_modules(model: nn.Module, config: MASMConfig) -> dict[str, Tensor]:
    """State under modules_to_save, by its full name."""
    values: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if matches(name, module, config.modules_to_save):
            values.update({f"{name}.{key}": value for key, value in module.state_dict(keep_vars=True).items()})
    return values


def _check_keys(expected: set[str], got: set[str]) -> None:
    missing, left_over = sorted(expected - got), sorted(got - expected)
    if missing or left_over:
        raise AdapterError(
            f"the adapter's tensors do not fit: "
            f"{len(missing)} missing {missing[:3]}, {len(left_over)} unexpected {left_over[:3]}"
        )
