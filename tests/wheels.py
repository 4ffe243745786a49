"""Builds a wheel from a copy of the sources, with pip in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


def run(*command, cwd=None, **env):
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join([scripts, os.environ["PATH"]])
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "PATH": path, **env})
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def copy_sources(repo, tmp_path) -> Path:
    """A copy of the sources, so that no build folder of the checkout is touched."""
    pytest.importorskip("scikit_build_core", reason="--no-build-isolation needs scikit-build-core in the environment")
    source = tmp_path / "source"
    keep = ("csrc", "masm_ext", "python", "_build_backend")
    source.mkdir()
    for name in keep:
        shutil.copytree(repo / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo / name, source)
    return source


def build_sdist(repo, tmp_path) -> Path:
    """The source distribution of a copy of the sources."""
    source = copy_sources(repo, tmp_path)
    code = f"import masm_backend; masm_backend.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=source, PYTHONPATH=str(source / "_build_backend"))
    [sdist] = tmp_path.glob("*.tar.gz")
    return sdist


def build_wheel(repo, tmp_path, cuda: str) -> Path:
    """A wheel of a copy of the sources, built without network."""
    return wheel_of(copy_sources(repo, tmp_path), tmp_path, cuda)


def wheel_of(source, tmp_path, cuda: str) -> Path:
    """The wheel that pip builds from a folder or a source distribution."""
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"),
        *("-w", str(tmp_path), str(source)),
        MASM_CUDA=cuda,
    )
    [wheel] = tmp_path.glob("*.whl")
    return wheel
