"""What several of the cache's test files use."""

import pytest

from ipfsfuse.cache.pins import holding, kubopins


@pytest.fixture
def quick_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins that wait for nothing longer than they must."""
    monkeypatch.setattr(kubopins, "LINGER", 0.02)
    monkeypatch.setattr(kubopins, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(holding, "PAUSES", (0.02, 0.02))
