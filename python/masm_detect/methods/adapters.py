"""A trained method as a small folder, the adapter: the trained weights and the identity of the backbone they fit.

The masm methods are written by `masm_ext.save_adapter`, which stores the hashes of all frozen tensors. The others are
written here, as `adapter.json` (with the hash of the whole plain backbone) and `trained.safetensors`.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from masm_detect.config import MethodConfig
from masm_detect.errors import CheckpointError
from masm_detect.hashes import file_sha256, tensors_sha256
from masm_detect.models.detector import Detector
from masm_detect.results import ResultError, read_json, remove_stale, write_json
from masm_ext.files import write_atomically

from .build import prepare_detector, resolve
from .method import Method, MethodSpec
from .quantized import quantize_backbone
from .registry import load
from .trainable import load_trainable_state, trainable_state

FORMAT = "masm-detect-adapter"
VERSION = 1
_TENSORS = "trained.safetensors"
# Beside masm adapters of format version 1, which have hashes of the adapted layers only.
_BASE = "base.json"


def base_sha256(detector: Detector) -> str:
    """SHA-256 of the plain backbone, as hex. Call it before a method adapts the backbone."""
    return tensors_sha256(detector.backbone.model.state_dict())


def save_method(
    detector: Detector, method: Method | MethodSpec, config: MethodConfig, folder: Path, *, base: str
) -> None:
    """Write the trained weights of `detector` to `folder`, each file atomically, the JSON last.

    `base` is the `base_sha256` of the backbone that the method was built on.
    """
    if method.uses_masm_ext:
        from masm_ext import save_adapter

        save_adapter(detector, folder)
        (folder / _BASE).unlink(missing_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    data = to_bytes(trainable_state(detector))
    write_atomically(folder / _TENSORS, data)
    write_json(
        folder / "adapter.json",
        {
            "format": FORMAT,
            "version": VERSION,
            "method": asdict(resolve(config)),
            "base_sha256": base,
            "sha256": hashlib.sha256(data).hexdigest(),
        },
    )
    remove_stale(folder)


def load_method(detector: Detector, config: MethodConfig, folder: Path) -> None:
    """Put a saved method on `detector`, which holds a plain backbone.

    Raises:
        CheckpointError: the folder is incomplete or damaged, of another method, or trained on another backbone.
    """
    if load(config.name).uses_masm_ext:
        from masm_ext import load_adapter

        if (folder / _BASE).is_file():
            _check_base(folder, read_json(folder / _BASE).get("base_sha256"), base_sha256(detector))
        load_adapter(detector, folder)
        quantize_backbone(detector, config)
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
        _check_base(folder, content["base_sha256"], base_sha256(detector))
        state = load_file(str(path))
    except (OSError, ResultError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{folder} is not a complete adapter folder: {error}") from error
    # Any seed: the saved weights replace all random ones, and the names must match exactly.
    prepare_detector(detector, config=resolve(config), seed=0)
    load_trainable_state(detector, state)
    quantize_backbone(detector, config)


def _check_base(folder: Path, trained_on: str, loaded: str) -> None:
    if trained_on != loaded:
        raise CheckpointError(
            f"{folder} was trained on another backbone: the SHA-256 of the loaded weights is not the one in the "
            "adapter; use the same pretrained checkpoint, in the same dtype"
        )
