"""A trained method as a small folder: what training changed and what is needed to put it on the same backbone again.

masm methods are written by `masm_ext.save_adapter`, which binds them to the hash of their base; the peers by this
file, as `adapter.json` and `trained.safetensors`.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .checkpoint import CheckpointError, file_sha256, load_trainable_state, trainable_state
from .config import MethodConfig
from .methods import Method, prepare_detector, resolve
from .models.detector import Detector
from .results import ResultError, read_json, write_json

FORMAT = "masm-detect-adapter"
VERSION = 1
_TENSORS = "trained.safetensors"


def save_method(detector: Detector, method: Method, config: MethodConfig, folder: Path) -> None:
    """Write the trained weights of `detector` to `folder`, atomically file by file, the JSON last."""
    if method.is_masm:
        from masm_ext import save_adapter

        save_adapter(detector, folder, masks=method.masks)
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{_TENSORS}.tmp"
    save_file(trainable_state(detector), str(temporary))
    os.replace(temporary, folder / _TENSORS)
    write_json(
        folder / "adapter.json",
        {
            "format": FORMAT,
            "version": VERSION,
            "method": asdict(resolve(config)),
            "sha256": file_sha256(folder / _TENSORS),
        },
    )


def load_method(detector: Detector, config: MethodConfig, folder: Path) -> None:
    """Put a saved method on `detector`, which holds a plain backbone. Strict: raises CheckpointError rather than
    guess.
    """
    if config.name.startswith("masm"):
        from masm_ext import load_adapter

        load_adapter(detector, folder)
        return
    path = folder / _TENSORS
    try:
        content = read_json(folder / "adapter.json")
        if content.get("format") != FORMAT or content.get("version", 0) > VERSION:
            raise CheckpointError(
                f"{folder / 'adapter.json'} has format {content.get('format')!r} version {content.get('version')!r}; "
                f"this program reads {FORMAT!r} up to version {VERSION}"
            )
        if content["method"]["name"] != config.name:
            raise CheckpointError(f"{folder} holds a {content['method']['name']!r} adapter, not {config.name!r}")
        if file_sha256(path) != content["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in adapter.json")
        state = load_file(str(path))
    except (OSError, ResultError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{folder} is not a complete adapter folder: {error}") from error
    # Seed 0: every random number that this draws is overwritten by the saved weights, and the names must match
    # exactly.
    prepare_detector(detector, config=resolve(config), seed=0)
    load_trainable_state(detector, state)
