import os
import sys
from pathlib import Path

import pytest
import torch

#: Under Triton's interpreter the tests run on a CPU with small shapes: a dry run, started by tests/interpreter.
DRY = not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "1"
if DRY:
    interpreter = Path(__file__).parents[1] / "interpreter"
    sys.path[:0] = [str(interpreter / "suite"), str(interpreter)]
    import bf16_patch  # noqa: F401  (patches the interpreter)


@pytest.fixture(scope="session")
def device():
    if not DRY:
        yield torch.device("cuda")
        return
    from triton_on_cpu import triton_serves_the_cpu

    with triton_serves_the_cpu():
        yield torch.device("cpu")


@pytest.fixture(scope="session")
def gpu_only():
    """For tests without a meaning on a CPU: streams, graphs, memory, host synchronisation."""
    if DRY:
        pytest.skip("runs on a GPU only")


@pytest.fixture
def shapes():
    """(M, N, D, ranks): sizes of real layers, and odd ones."""
    if DRY:
        return [(37, 33, 40, (3, 5)), (5, 16, 24, (4,)), (34, 20, 16, (30, 40))]
    return [
        (2056, 1024, 1024, (4, 4, 4, 4)),
        (8224, 1024, 4096, (16,)),
        (8224, 4096, 1024, (12, 12, 24)),
        (1, 1024, 1024, (16,)),
        (64, 1024, 1024, (8, 8)),
        (257, 100, 72, (3, 5)),
        (1000, 333, 517, (7,)),
        (600, 384, 1536, (64, 64, 128)),
    ]


@pytest.fixture(autouse=True)
def exact_float32():
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"
