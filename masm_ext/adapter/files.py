"""The files of an adapter and the checks on reading them.

A folder with ``adapter.json`` and one safetensors file that it names. The JSON holds the format version, the config,
per layer its row bounds, its directions and the identity of its base weight, the names of the saved modules, the
identity (SHA-256, dtype, shape) of every other tensor of the base, the masks, and a SHA-256 of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..config import MASMConfig
from ..files import locked, staged
from ..registry import DIRECTIONS, MASK_POLICIES, PARTITIONS

FORMAT = "masm_ext adapter"
FORMAT_VERSION = 2
JSON_NAME = "adapter.json"


class AdapterError(ValueError):
    """An adapter that cannot be loaded: another base model, a damaged file, a newer format."""


def write_adapter(
    folder: Path,
    record: dict[str, Any],
    tensors: Mapping[str, Tensor],
    check: Callable[[dict[str, Any], dict[str, Tensor]], None],
) -> Path:
    """Write an adapter to temporary files, read them back, call ``check(record, tensors)``, and rename them into place.

    If a step raises, ``folder`` stays as it was. Returns the path of the JSON.
    """
    data = safetensors.torch.save({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    file_name = f"adapter-{digest[:12]}.safetensors"
    record = {**record, "tensors": {"file": file_name, "sha256": digest}}
    record["sha256"] = digest_of(record)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path, tensors_path = folder / JSON_NAME, folder / file_name
    try:
        with locked(folder):
            replaced = tensors_named_by(path)
            try:
                # Left in reverse order, so that the JSON is renamed last.
                with (
                    staged(path, json.dumps(record, indent=1).encode()) as new_json,
                    staged(tensors_path, data) as new_tensors,
                ):
                    written = parse_record(new_json)
                    check(written, read_tensors(new_tensors, written))
            except BaseException:
                if replaced != file_name:
                    tensors_path.unlink(missing_ok=True)
                raise
            if replaced is not None and replaced != file_name:
                (folder / replaced).unlink(missing_ok=True)
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return path


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """The checked content of ``adapter.json``: config, layers, hashes, masks."""
    path = Path(folder) / JSON_NAME
    if not path.exists():
        raise FileNotFoundError(f"no adapter in {folder}: {JSON_NAME} is missing")
    return parse_record(path)


def parse_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        version = record["format_version"]
        if record["format"] != FORMAT or type(version) is not int or version < 1:
            raise ValueError(f"format {record['format']!r}, version {version!r}: not an adapter of masm_ext")
        if version > FORMAT_VERSION:
            raise AdapterError(
                f"{path} has format version {version}, this masm_ext reads up to {FORMAT_VERSION}: upgrade masm_ext"
            )
        if record["sha256"] != digest_of(record):
            raise ValueError("its content is not what was written (SHA-256)")
        if version == 1:  # version 2 added these
            record |= {"base": None, "saved_modules": None}
            record["layers"] = {n: {**e, "shape": None, "bias": None} for n, e in record["layers"].items()}
        _check_names(path, record["config"])
        _check_record(record)
    except AdapterError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AdapterError(f"{path} is damaged or was changed: {error!r}") from error
    return record


def _check_names(path: Path, config: dict[str, Any]) -> None:
    """Raises AdapterError for a choice that is not registered in this process."""
    registries = {"directions": DIRECTIONS, "partition": PARTITIONS, "mask_policy": MASK_POLICIES}
    for field, registry in registries.items():
        name = config.get(field)
        if isinstance(name, str) and name not in registry:
            raise AdapterError(
                f"{path} was made with {field}={name!r}, which is not registered here: import the module that "
                f"registers it, or upgrade masm_ext (there are {', '.join(registry)})"
            )


def _check_record(record: dict[str, Any]) -> None:
    """Raises ValueError, KeyError, TypeError and others if a record cannot be used."""
    K, masks = MASMConfig.from_dict(record["config"]).num_subspaces, record["masks"]
    if masks is not None and [len(row) for row in masks] != [K] * len(record["layers"]):
        raise ValueError("masks do not have the shape [L, K]")
    if masks is not None and not all(isinstance(value, int | float) for row in masks for value in row):
        raise ValueError("masks must be numbers")
    if not record["layers"]:
        raise ValueError("it has no layers")
    for name, entry in record["layers"].items():
        offsets = entry["offsets"]
        if len(offsets) != K + 1 or offsets[0] != 0 or not all(type(n) is int for n in offsets):
            raise ValueError(f"layer {name!r} has wrong offsets {offsets}: expected K + 1 = {K + 1} ints from 0")
        if any(a >= b for a, b in pairwise(offsets)):
            raise ValueError(f"layer {name!r} has wrong offsets {offsets}: every subspace needs a rank of 1 or more")
        directions = entry.get("directions")
        if directions is not None and not all(type(i) is int for i in directions):
            raise ValueError(f"layer {name!r} has directions {directions!r}: expected ints")
        if not isinstance(entry["energy"], int | float):
            raise ValueError(f"layer {name!r} has energy {entry['energy']!r}")
        _check_identity(name, {**entry, "sha256": entry["base_sha256"]})
        if record["format_version"] > 1 and (len(entry["shape"]) != 2 or type(entry["bias"]) is not bool):
            raise ValueError(f"layer {name!r} is incomplete")
    for name, entry in (record["base"] or {}).items():
        _check_identity(name, entry)
    if record["format_version"] > 1:
        if not isinstance(record["base"], dict):
            raise ValueError("base must be a table of tensors")
        if not all(isinstance(name, str) for name in record["saved_modules"]):
            raise ValueError("saved_modules must be names")
    file = record["tensors"]["file"]
    if Path(file).name != file:
        raise ValueError(f"it names a file outside its folder: {file!r}")
    record["tensors"]["sha256"]


def _check_identity(name: str, entry: dict[str, Any]) -> None:
    if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        raise ValueError(f"{name!r} has no SHA-256: {entry['sha256']!r}")
    if not isinstance(getattr(torch, entry["dtype"], None), torch.dtype):
        raise ValueError(f"{name!r} has the unknown dtype {entry['dtype']!r}")
    if entry["shape"] is not None and not all(type(n) is int and n >= 0 for n in entry["shape"]):
        raise ValueError(f"{name!r} has the shape {entry['shape']!r}")


def digest_of(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its own digest."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def tensors_named_by(path: Path) -> str | None:
    """The tensor file of the adapter to be replaced, None if it is missing or unreadable."""
    try:
        name = json.loads(path.read_bytes())["tensors"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and Path(name).name == name and name.startswith("adapter-") else None


def read_tensors(path: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    if not path.exists():
        raise AdapterError(f"{path} is missing: the adapter is incomplete")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record["tensors"]["sha256"]:
        raise AdapterError(f"{path} is truncated or was changed: its SHA-256 is not the one in {JSON_NAME}")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{path} is no valid safetensors file: {error}") from error


def some(names: Collection[str], most: int = 3) -> str:
    """The first of some names, for a message."""
    shown = ", ".join(list(names)[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
