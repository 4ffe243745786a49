"""The state of an unfinished run: one safetensors file and one JSON file, no pickle, valid at every moment.

`state.json` names the tensor file and its SHA-256, and is moved into place last: a kill before that leaves the
previous checkpoint valid, a kill after it the new one. Reading beside a program that writes gives one of the two.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from masm_detect.errors import CheckpointError
from masm_detect.hashes import file_sha256
from masm_detect.results import ResultError, read_json, remove_stale, write_text
from masm_ext.files import write_atomically

FORMAT = "masm-detect-checkpoint"
VERSION = 4


def save(folder: Path | str, state: dict[str, Any]) -> None:
    """Write `state` (nested dicts, lists, tuples, tensors, numbers, strings, None) as the checkpoint in `folder`.

    The step in `state["position"]["step"]` names the tensor file, so that old and new never share a name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    structure = pack(state, tensors)
    name = f"state-{int(state['position']['step']):08d}.safetensors"
    data = to_bytes(tensors)
    # Flushed to disk before the JSON that names it.
    write_atomically(folder / name, data)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "state": structure,
    }
    # NaN is allowed here, unlike in results: a loss that became NaN is part of the state.
    write_text(folder / "state.json", json.dumps(content, indent=1))
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()
    remove_stale(folder)


def load(folder: Path | str) -> dict[str, Any]:
    """Read what `save` wrote. Raises `CheckpointError` with the reason if it cannot be trusted."""
    folder = Path(folder)
    path = folder / "state.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no checkpoint (no state.json)")
    try:
        content = read_json(path)
    except ResultError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this package")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')}, this program reads {VERSION}: continue with the "
            "version that wrote it, or start a new run"
        )
    tensors_path = folder / content["tensors"]
    try:
        if file_sha256(tensors_path) != content["sha256"]:
            raise CheckpointError(f"{tensors_path} is damaged: its SHA-256 is not the one in {path.name}")
        tensors = load_file(str(tensors_path))
    except FileNotFoundError as error:
        if read_json(path)["tensors"] != content["tensors"]:
            return load(folder)  # a running program has written its next checkpoint since state.json was read
        raise CheckpointError(f"{tensors_path} is missing, though {path.name} names it") from error
    except SafetensorError as error:
        raise CheckpointError(f"{tensors_path} cannot be read: {error}") from error
    return unpack(content["state"], tensors)


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON can hold it, with every tensor moved into `tensors` and replaced by its name there."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"$tensor": name}
    if isinstance(value, dict):
        return {"$dict": [[pack(key, tensors), pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [pack(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, content), *rest = value.items()
    if rest or kind not in ("$tensor", "$dict", "$tuple"):
        raise CheckpointError(f"unknown entry in a checkpoint: {sorted(value)}")
    if kind == "$tensor":
        if content not in tensors:
            raise CheckpointError(f"the tensor file of the checkpoint has no {content}")
        return tensors[content]
    if kind == "$tuple":
        return tuple(unpack(item, tensors) for item in content)
    return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
