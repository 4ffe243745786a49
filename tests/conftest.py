import os
import sys
from pathlib import Path

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
THREADS_ARE_FIXED = "OMP_NUM_THREADS" in os.environ
if PARALLEL:  # workers share the cores: one thread each, also in the processes they start; torch reads it at its import
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside this file
from heartbeat import Heartbeat


def pytest_configure(config):
    if not PARALLEL:  # a worker prints nothing
        config.pluginmanager.register(Heartbeat(config))


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu run only where there is one, or as a dry run in the interpreter (tests/interpreter). Those that
    take longest start first, so that no process is left with one of them at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if config.getoption("--first-only"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
        items[:] = [item for item in items if item in first.values()]
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        skip = pytest.mark.skip(reason="no NVIDIA GPU on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords would be met by a folder of this name, too
                item.add_marker(skip)


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="repeat a run with this seed (fresh inputs are drawn by default)")
    parser.addoption("--first-only", action="store_true", help="of each test, only its first set of parameters")


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Every test draws fresh inputs; a failure shows the seed that repeats them, and the threads with them."""
    value = request.config.getoption("--seed")
    value = int.from_bytes(os.urandom(4), "little") if value is None else value
    print(f"inputs drawn with --seed {value}")
    torch.manual_seed(value)
    if not THREADS_ARE_FIXED:  # kernels take another path with one thread than with several
        torch.set_num_threads(1 + value % 2)
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
