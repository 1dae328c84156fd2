import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test reads or leaves anything in the user's cache."""
    monkeypatch.setenv("MOE_ZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
