"""Opens files that a user or a guest names."""

import os
from pathlib import Path
from typing import BinaryIO


def open_to_read(path: str | Path) -> BinaryIO:
    """Opens the file at `path` for reading. Does not wait for the writer of a named pipe. Raises OSError."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
