"""The versions of Triton under test: the pinned one, and that of common GPU images."""

import os
import sys
from pathlib import Path

import pytest

#: Where `make test-kernels` installs the second one.
OTHER = Path(sys.prefix) / "triton-3.6"
VERSIONS = ("pinned", "3.6")


def environment_of(version: str) -> dict[str, str]:
    """The environment of a process that imports this Triton, without settings of Triton. Skips where it is missing."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    if version == "3.6":
        if not (OTHER / "triton").is_dir():
            pytest.skip(f"no {OTHER.name} in the environment: `make test-kernels` installs it")
        environment["PYTHONPATH"] = os.pathsep.join([str(OTHER), os.environ.get("PYTHONPATH", "")])
    else:
        pytest.importorskip("triton", reason="Triton is not installed (it has no build for this platform?)")
    return environment
