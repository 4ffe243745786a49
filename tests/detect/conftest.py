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
