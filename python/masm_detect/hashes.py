"""SHA-256 of files and of tensors, the one place for both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from masm_ext.hashing import weight_hash
from masm_ext.quantized_weight import is_quantized


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folder_sha256(folder: Path) -> dict[str, str]:
    """SHA-256 of each file directly in a folder, by name; empty if there is no such folder."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file.name: file_sha256(file) for file in files if file.is_file()}


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of `tensors`, in order of their names; as hex.

    A weight of 8 bits counts with the tensors that it holds.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if is_quantized(tensor):
            digest.update(weight_hash(tensor).encode())
            continue
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
