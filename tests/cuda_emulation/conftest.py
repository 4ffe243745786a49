import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # emulated.py


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """stem -> the library of tests/cuda_emulation/<stem>.cpp, built once."""
    from emulated import COMPILER, build

    if COMPILER is None:
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("emulated")
    return cache(lambda stem: build(stem, folder))
