"""Files that the runner reads and others name."""

import os
from pathlib import Path
from typing import BinaryIO


def open_to_read(path: str | Path) -> BinaryIO:
    """The file at `path`, to be read. Opening a named pipe does not wait for its writer. Raises OSError."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
