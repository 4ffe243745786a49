import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """SVDs of these tests are cached for each on its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
