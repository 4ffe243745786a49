"""Finds and loads the compiled libraries. Importing this module registers the schemas under ``torch.ops.masm``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import torch


def _locate(stem: str) -> Path | None:
    # find_spec finds <stem>.so in wheels and in editable installs, where .py and .so are in different folders. The
    # metadata find it in a run from the repository root, whose folder masm_ext/ shadows the installed package.
    spec = importlib.util.find_spec(f"{__package__}.{stem}")
    if spec is not None and spec.origin:
        return Path(spec.origin)
    try:
        files = importlib.metadata.files("masm_ext") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == stem + ".so":
            return Path(str(file.locate()))
    return None


def _load(stem: str) -> Path | None:
    path = _locate(stem)
    if path is not None:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise ImportError(
                f"masm_ext: {path} does not load beside torch {torch.__version__} (it needs torch>=2.10): {error}. "
                "Reinstall with `pip install --force-reinstall --no-deps .` in the environment that runs it."
            ) from error
    return path


CPU_LIBRARY = _load("libmasm_cpu")
if CPU_LIBRARY is None:
    raise ImportError(
        "masm_ext: its compiled library libmasm_cpu.so is not installed. Run `pip install .` in the source folder "
        "(see docs/install.md)."
    )
# The CUDA library needs the CUDA runtime that a CUDA torch brings. Loading it does not initialise CUDA.
CUDA_LIBRARY = _load("libmasm_cuda") if torch.version.cuda is not None else None
#: Whether a CUDA library was built, even if this torch cannot load it.
CUDA_BUILT = _locate("libmasm_cuda") is not None
