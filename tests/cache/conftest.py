"""What several of the cache's test files use."""

import pytest

from ipfsfuse.cache.pins import kubo_pins, mfs


@pytest.fixture
def quick_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins that wait for nothing longer than they must."""
    monkeypatch.setattr(kubo_pins, "COLLECT_SECONDS", 0.02)
    monkeypatch.setattr(kubo_pins, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(mfs, "PAUSES", (0.02, 0.02))
