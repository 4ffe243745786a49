import os
import sys
from pathlib import Path

import pytest
import torch

# collected only in the process that ../test_interpreter.py starts
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    import bf16_patch  # noqa: F401  (patches the interpreter)


@pytest.fixture(autouse=True)
def poison():
    """torch.empty returns NaN: an element that a kernel does not write fails its test."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_plans():
    """Plans are not shared between tests: a test may patch what they depend on."""
    from masm_ext.kernels import launch_plan

    launch_plan.forget()
    yield
    launch_plan.forget()
