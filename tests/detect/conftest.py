"""Fixtures shared by the tests of masm_detect."""

from __future__ import annotations

import pytest
import tiny
from masm_detect.data import content_cache


@pytest.fixture(autouse=True)
def own_content_cache(tmp_path_factory, monkeypatch):
    """The cache file of this test alone, instead of the user's."""
    path = tmp_path_factory.mktemp("cache") / "contents.sqlite"
    monkeypatch.setattr(content_cache, "default_cache_file", lambda: path)
    return path


@pytest.fixture
def tiny_detector():
    return tiny.detector


@pytest.fixture
def tiny_data(tmp_path):
    return tiny.write_data(tmp_path / "data")


@pytest.fixture
def tiny_backbone(tmp_path):
    """Local folder, in Hugging Face layout, with the backbone of `tiny_detector`."""
    folder = tmp_path / "backbone"
    tiny.detector().backbone.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a run of masm on `tiny.write_data`; its data are beside it, in data/."""
    folder = tmp_path_factory.mktemp("tiny-run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content_cache, "default_cache_file", lambda: folder / "contents.sqlite")
        return tiny.trained_run(folder)
