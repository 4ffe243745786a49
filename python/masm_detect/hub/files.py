"""The files of a saved detector, in a local folder or on the hub."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from masm_detect.results import check_output_folder, read_json

from .configuration import HubError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"
#: Subfolder with the files of `methods.adapters.save_method`.
ADAPTER = "adapter"


def read_weights(name: str, **hub: Any) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`, or of all its shards.

    Args:
        name: folder or hub id.
        **hub: as of `transformers.utils.cached_file`.

    Raises:
        HubError: they are absent or damaged.
    """
    path = find(name, WEIGHTS, **hub)
    if path is not None:
        return _load(path)
    index = find(name, INDEX, **hub)
    if index is None:
        raise HubError(f"{name} has neither {WEIGHTS} nor {INDEX}; weights in other formats are not read")
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    state: dict[str, Tensor] = {}
    for shard in shards:
        path = find(name, shard, **hub)
        if path is None:
            raise HubError(f"{name} lacks {shard}, which its {INDEX} names: copy all files, or download it again")
        state |= _load(path)
    return state


def find(name: str, file: str, **hub: Any) -> str | None:
    """Path of a file of a folder or hub id; None if there is no such file."""
    from transformers.utils import cached_file

    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
    except (OSError, ValueError) as error:  # ValueError: no form of a hub id
        raise HubError(f"{name} is neither a local folder nor a hub id that can be reached ({error})") from error


def adapter_folder(name: str, **hub: Any) -> Path:
    """The local folder with the adapter of `name`, downloaded if `name` is a hub id."""
    local = Path(name) / hub.get("subfolder", "") / ADAPTER
    if local.is_dir():
        return local
    subfolder = os.path.join(hub.pop("subfolder", ""), ADAPTER)
    path = find(name, "adapter.json", subfolder=subfolder, **hub)
    if path is None:
        raise HubError(f"{name} has no {ADAPTER}/adapter.json, which its {CONFIG} needs: copy the whole folder")
    content = read_json(path)
    tensors = content["tensors"]["file"] if "tensors" in content else "trained.safetensors"
    if Path(tensors).name != tensors or find(name, tensors, subfolder=subfolder, **hub) is None:
        raise HubError(f"{name} lacks {ADAPTER}/{tensors}, which its adapter.json names: download it again")
    return Path(path).parent


@contextmanager
def written_together(folder: Path | str) -> Iterator[Path]:
    """A new folder to write to, whose files then replace those of `folder` one by one, config.json last.

    If the block raises, `folder` stays as it was.
    """
    target = Path(folder)
    check_output_folder(target)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hub-", suffix=".tmp", dir=target) as name:
        new = Path(name)
        yield new
        paths = [path for path in new.rglob("*") if path.is_file()]
        written = {path.relative_to(new) for path in paths}
        for path in sorted(paths, key=lambda path: path.name == CONFIG):
            path.chmod(0o644)
            place = target / path.relative_to(new)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        _remove_other_weights(target, written)


def _remove_other_weights(target: Path, written: set[Path]) -> None:
    """Delete the weights of an earlier save to the same folder: a reader would take them for those of config.json."""
    for path in [*target.glob("model*.safetensors"), target / INDEX, *target.glob(f"{ADAPTER}/*")]:
        if path.is_file() and path.relative_to(target) not in written:
            path.unlink()
    with suppress(OSError):  # absent, or not empty
        (target / ADAPTER).rmdir()


def _load(path: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise HubError(f"{path} cannot be read as safetensors (damaged?): {error}") from error
