import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tolerances.py


def pytest_collection_modifyitems(items):
    """Tests marked gpu run only where there is one, or as a dry run in the interpreter (tests/interpreter)."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        skip = pytest.mark.skip(reason="no NVIDIA GPU on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords would be met by a folder of this name, too
                item.add_marker(skip)


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="repeat a run with this seed (fresh inputs are drawn by default)")


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Every test draws fresh inputs; a failure shows the seed that repeats them."""
    value = request.config.getoption("--seed")
    value = int.from_bytes(os.urandom(4), "little") if value is None else value
    print(f"inputs drawn with --seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def threads():
    """A test that changes the number of threads leaves it as it was."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def repo() -> Path:
    return Path(__file__).parents[1]
