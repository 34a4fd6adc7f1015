"""Fixtures that several test files of the cache use."""

import pytest

from ipfsfuse.cache.pins import kubo_pins, mfs


@pytest.fixture
def quick_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the waits of pins short."""
    monkeypatch.setattr(kubo_pins, "COLLECT_SECONDS", 0.02)
    monkeypatch.setattr(kubo_pins, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(mfs, "PAUSES", (0.02, 0.02))
