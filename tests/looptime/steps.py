"""Daemons whose event loop is watched (`sitecustomize` beside this says how)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mounting import Home

LONGEST = 0.05
"""Seconds of CPU time that one step of the event loop may take."""


@contextmanager
def none_is_long(home: Home) -> Iterator[None]:
    """No event loop of what `home` starts within the block has a step of over LONGEST, and no pass of the
    cycle collector takes longer."""
    notes = home.folder / "steps"
    here = {
        "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{home.env['PYTHONPATH']}",
        "IPFSFUSE_TEST_STEPS": str(notes),
    }
    before = {name: home.env.get(name) for name in here}
    home.env |= here
    try:
        yield
    finally:
        home.env |= {name: value for name, value in before.items() if value is not None}
    lines = notes.read_text().splitlines() if notes.exists() else []
    assert [line for line in lines if float(line.split()[1]) > LONGEST] == []
