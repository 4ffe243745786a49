"""Runs the suite of this folder under Triton's interpreter, in a process of its own for each Triton.

What interprets and what compiles cannot share a process, and a kernel that reads out of bounds ends it.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from tritons import VERSIONS, environment_of

SUITE = Path(__file__).parent / "suite"
#: What a GPU runs; here as a dry run, on small shapes. Streams, graphs and memory need a GPU and are skipped.
GPU = Path(__file__).parents[1] / "gpu"


@pytest.mark.parametrize("triton", VERSIONS)
def test_kernels_in_the_interpreter(triton, seed):
    environment = {**environment_of(triton), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUITE), str(GPU), f"--seed={seed}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2700)
    assert run.returncode == 0, (
        f"exit {run.returncode} (negative: a signal)\n{run.stdout[-8000:]}\n{run.stderr[-4000:]}"
    )
    skipped = [line for line in run.stdout.splitlines() if line.startswith("SKIPPED") and "a GPU only" not in line]
    assert " passed" in run.stdout and not skipped, run.stdout[-2000:]
