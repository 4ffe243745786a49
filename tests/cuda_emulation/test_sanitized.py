"""The tests of this folder again, with the kernels built under address and undefined-behaviour sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import COMPILER, FLAGS

HERE = Path(__file__).parent


@pytest.mark.kernels
@pytest.mark.skipif(bool(FLAGS), reason="this is the sanitized run")
@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C++ compiler")
@pytest.mark.long
def test_addresses_and_undefined_behaviour():
    def runtime(name: str) -> str:
        return subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()

    preload = [runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    if not all(Path(path).is_absolute() for path in preload):
        pytest.skip(f"{COMPILER} has no sanitizers")
    environment = {
        **os.environ,
        "MASM_EMULATED_SANITIZED": "1",
        "LD_PRELOAD": " ".join(preload),
        # Python keeps memory until it ends; fibers have stacks of their own
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    output = run.stdout + run.stderr
    assert run.returncode == 0 and " passed" in run.stdout and "runtime error" not in output, output[-5000:]
