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
def process_settings():
    """Restores torch's threads and determinism after a test that sets them: they hold for the whole process."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def repo() -> Path:
    return Path(__file__).parents[1]
