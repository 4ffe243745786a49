"""The tests that need timm and open_clip, in processes with the packages that `make test` installs for them alone.

They need torchvision. PyPI has its CUDA build only, and beside a CPU build of torch that build stops transformers from
loading any model. So these packages are in a folder of their own, and a plugin makes torchvision importable.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
VISION = Path(sys.prefix) / "vision"
FILES = ("models/test_timm.py", "models/test_families.py", "hub/test_families.py")


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed: nothing is skipped here")
@pytest.mark.parametrize("file", FILES)
def test_with_timm_and_open_clip(file, repo, seed):
    if not (VISION / "timm").is_dir():
        pytest.skip(f"no {VISION.name}/ in the environment: `make test` installs timm and open_clip there")
    tests = repo / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "torchvision_without_operators", "-p", "no:cacheprovider"]
    command += [str(tests / "detect" / file), "--seed", str(seed)]
    paths = os.pathsep.join([str(VISION), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "timm is not installed" not in done.stdout and "open_clip is not installed" not in done.stdout
