"""A tiny trained run, once for all tests of this folder."""

from __future__ import annotations

import pytest
import tiny
from masm_detect.data import content_cache


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a run of masm on `tiny.write_data`; its data are beside it, in data/."""
    folder = tmp_path_factory.mktemp("tiny-run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content_cache, "default_cache_file", lambda: folder / "contents.sqlite")
        return tiny.trained_run(folder)
