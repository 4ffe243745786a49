"""Runs the suite of this folder under Triton's interpreter, each file in a process of its own.

What interprets and what compiles cannot share a process, and a kernel that reads out of bounds ends its process.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from tritons import VERSIONS, environment_of

SUITE = Path(__file__).parent / "suite"
#: What a GPU runs; here as a dry run, on small shapes. Streams, graphs and memory need a GPU and are skipped.
GPU = Path(__file__).parents[1] / "gpu"
FILES = sorted([*SUITE.glob("test_*.py"), *GPU.glob("test_*.py")])


def interpret(files: list[Path], triton: str, seed: int, *options: str) -> None:
    """Run test files under the interpreter of this Triton; no test may fail, or be skipped without needing a GPU."""
    environment = {**environment_of(triton), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--seed={seed}", *options, *files]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, (
        f"exit {run.returncode} (negative: a signal)\n{run.stdout[-8000:]}\n{run.stderr[-4000:]}"
    )
    skipped = [line for line in run.stdout.splitlines() if line.startswith("SKIPPED") and "a GPU only" not in line]
    assert not skipped, run.stdout[-2000:]
    assert " passed" in run.stdout or set(files) <= set(GPU.iterdir()), run.stdout[-2000:]


@pytest.mark.kernels
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("triton", VERSIONS)
@pytest.mark.long
def test_kernels_in_the_interpreter(triton, file, seed):
    interpret([file], triton, seed)


@pytest.mark.long
def test_each_kernel_once_in_the_interpreter(seed):
    interpret(sorted(SUITE.glob("test_*.py")), "pinned", seed, "--first-only")
