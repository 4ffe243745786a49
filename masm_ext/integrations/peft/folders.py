"""Adapters of PEFT on disk <-> adapters of :func:`masm_ext.save_adapter`: the same tensors, bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ...adapter.files import FORMAT, FORMAT_VERSION, AdapterError, read_record, read_tensors, some, write_adapter
from ...adapter.load import check_base
from ...adapter.plan import FACTORS, plan_layers
from ...base_model import base_entries, base_tensors
from ...config import MASMConfig
from ...files import locked, staged
from ...hashing import list_hash, tensor_hashes
from ...nn.extra_state import ExtraState
from ...selection import check_convertible, saved_modules, saved_state
from ...wrappers import unwrapped_modules
from .config import MATCHED_BY_PEFT, MASMTunerConfig
from .peft_type import PREFIX

ATTRIBUTE = "masm_subspaces"


def adapter_to_peft(
    folder: str | os.PathLike, peft_folder: str | os.PathLike, *, base_model_name_or_path: str | None = None
) -> MASMTunerConfig:
    """Write an adapter of :func:`masm_ext.save_adapter` as a folder for ``PeftModel.from_pretrained``.

    Factors, masks, biases and saved modules are those of the adapter bit for bit. The hashes of the adapted weights are
    kept, and checked when PEFT loads the adapter; PEFT does not check the other weights of the base.

    Args:
        folder: written by ``save_adapter``.
        peft_folder: created if it does not exist; an adapter in it is replaced.
        base_model_name_or_path: name of the base model on the hub, or its folder, for the config of PEFT.

    Returns:
        The config that was written.

    Raises:
        AdapterError: the files of the adapter are damaged or have a newer format.
        FileNotFoundError: ``folder`` holds no adapter.
    """
    record = read_record(folder)
    tensors = read_tensors(Path(folder) / record["tensors"]["file"], record)
    settings = MASMConfig.from_dict(record["config"]).to_dict()
    shared = {name: value for name, value in settings.items() if name not in MATCHED_BY_PEFT}
    layers = {name: _complete(name, entry, tensors) for name, entry in record["layers"].items()}
    config = MASMTunerConfig(
        **shared,
        target_modules=list(layers),
        modules_to_save=list(record["saved_modules"] or settings["modules_to_save"]) or None,
        layers=layers,
        inference_mode=True,
        base_model_name_or_path=base_model_name_or_path,
    )
    masks = record["masks"] or [[1] * settings["num_subspaces"]] * len(layers)
    values: dict[str, Tensor] = {}
    for (name, entry), mask in zip(layers.items(), masks):
        prefix = f"{PREFIX}{name}.{ATTRIBUTE}."
        values |= {prefix + factor: tensors[f"layers.{name}.{factor}"] for factor in FACTORS}
        values[prefix + "mask"] = torch.tensor(mask) != 0
        ranks = [b - a for a, b in pairwise(entry["offsets"])]
        rows = list_hash(entry["directions"])
        state = ExtraState(entry["base_sha256"], 0, rows, list_hash(ranks), settings["lift"])
        values[prefix + "_extra_state"] = state.to_tensor()
        if f"layers.{name}.bias" in tensors:
            values[prefix + "bias"] = tensors[f"layers.{name}.bias"]
    values |= {PREFIX + key[6:]: value for key, value in tensors.items() if key.startswith("saved.")}
    target = Path(peft_folder)
    target.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({k: v.contiguous() for k, v in values.items()}, metadata={"format": "pt"})
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True).encode()
    # left in reverse order: the config is renamed last
    with (
        locked(target),
        staged(target / CONFIG_NAME, text),
        staged(target / SAFETENSORS_WEIGHTS_NAME, data),
    ):
        pass
    return config


def peft_to_adapter(peft_folder: str | os.PathLike, model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write a folder of PEFT's ``save_pretrained`` as an adapter for :func:`masm_ext.load_adapter`.

    The tensors are those of the folder bit for bit.

    Args:
        peft_folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: the pretrained base model, without an adapter; it is read, not changed. The adapted weights are compared
            with those that the adapter was trained on; the new adapter is bound to all of its weights.
        folder: created if it does not exist; an adapter in it is replaced.

    Returns:
        The path of ``adapter.json``.

    Raises:
        AdapterError: the folder holds no MASM adapter, its tensors are not complete, or ``model`` is another base.
    """
    config, values = _read_peft(Path(peft_folder))
    if not config.layers:
        raise AdapterError(
            f"{Path(peft_folder) / CONFIG_NAME} records no layers: save the adapter with save_pretrained"
        )
    modules = dict(unwrapped_modules(model))
    linears = {name: modules.get(name) for name in config.layers}
    missing = [name for name, linear in linears.items() if not isinstance(linear, nn.Linear)]
    if missing:
        raise AdapterError(f"the adapter converts {some(missing)}, where this model has no nn.Linear: another model")
    own, saved_values, masks = _sorted_out(values, list(config.layers))
    try:
        check_convertible(model, linears)
        settings = MASMConfig.from_dict(
            {
                **config.masm_config().to_dict(),
                "target_modules": list(config.layers),
                "modules_to_save": config.modules_to_save or (),
            }
        )
        saved = saved_modules(modules, settings.modules_to_save)
        frozen = base_tensors(modules, linears, saved, settings.train_bias)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"the adapter does not fit this model: {error}") from error
    state = saved_state(modules, saved)
    record: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": settings.to_dict(),
        "layers": config.layers,
        "saved_modules": saved,
        "masks": [masks[name] for name in config.layers],
        "base": base_entries(frozen, tensor_hashes(frozen)),
    }
    tensors = own | {f"saved.{name}": value for name, value in saved_values.items()}
    check_base(record, linears, frozen)  # compares the adapted weights
    return write_adapter(Path(folder), record, tensors, lambda *written: plan_layers(*written, linears, state))


def _complete(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The record of a layer as :class:`MASMTunerConfig` holds it. Format version 1 lacks some of its entries."""
    (R, N), D = tensors[f"layers.{name}.u"].shape, tensors[f"layers.{name}.v"].shape[1]
    if entry["bias"] is None:
        raise AdapterError(
            f"the adapter has format version 1, which records too little of {name!r}: load it by load_adapter, and "
            "save it again"
        )
    known = ("offsets", "energy", "base_sha256", "dtype", "bias")
    return {**{k: entry[k] for k in known}, "shape": [N, D], "directions": list(entry.get("directions") or ())[:R]}


def _read_peft(folder: Path) -> tuple[MASMTunerConfig, dict[str, Tensor]]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}: save the adapter with safe_serialization=True")
    config = MASMTunerConfig.from_pretrained(str(folder))
    if not isinstance(config, MASMTunerConfig):
        raise AdapterError(f"{folder / CONFIG_NAME} is a {type(config).__name__}, not that of a MASM adapter")
    try:
        return config, safetensors.torch.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path} is no valid safetensors file: {error}") from error


def _sorted_out(
    values: Mapping[str, Tensor], names: list[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, list[int]]]:
    """(tensors of the layers, tensors of saved modules, masks) from the tensors of a PEFT folder."""
    own: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    masks: dict[str, list[int]] = {}
    for key, value in values.items():
        name, found, part = key.removeprefix(PREFIX).partition(f".{ATTRIBUTE}.")
        if not found:
            saved[name] = value
        elif part == "mask":
            masks[name] = value.int().tolist()
        elif part != "_extra_state":
            own[f"layers.{name}.{part}"] = value
    lacking = [name for name in names if name not in masks]
    if lacking:
        raise AdapterError(f"the adapter's tensors do not fit: {some(lacking)} have no masks")
    return own, saved, masks
