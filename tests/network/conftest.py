"""A home for each test."""

from pathlib import Path

import pytest

from tests.mounting import Home
from tests.sources.ipns import server as server


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)
