"""Starts daemons whose event loop is watched by `sitecustomize` in this folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mounting import Home

LONGEST = 0.05
"""Seconds of CPU time that one step of the event loop may take."""


@contextmanager
def no_step_is_long(home: Home) -> Iterator[None]:
    """A context manager. Checks that no step of the event loops of the daemons that `home` starts within the
    block takes longer than LONGEST, and no pass of the cycle collector."""
    notes = home.folder / "steps"
    added = {
        "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{home.env['PYTHONPATH']}",
        "IPFSFUSE_TEST_STEPS": str(notes),
    }
    before = {name: home.env.get(name) for name in added}
    home.env |= added
    try:
        yield
    finally:
        home.env |= {name: value for name, value in before.items() if value is not None}
    lines = notes.read_text().splitlines() if notes.exists() else []
    assert [line for line in lines if float(line.split()[1]) > LONGEST] == []
