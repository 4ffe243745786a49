"""The folder of real forgeries that some tests read: `MASM_TEST_DATA`, or `shared/data` beside the checkout.

No image of it is in this repository; tests skip without it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("MASM_TEST_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data"))


def need(*names: str) -> list[Path]:
    """The data sets called so; the test skips if one is absent."""
    if missing := [name for name in names if not (DATA / name).is_dir()]:
        pytest.skip(f"no test data {missing}: set MASM_TEST_DATA")
    return [DATA / name for name in names]
