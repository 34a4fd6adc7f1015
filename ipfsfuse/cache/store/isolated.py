"""A cache folder for one guest's life: in the temporary folder, ours alone, gone afterwards.

What a `kill -9` left is swept by the next start: folders that no living process holds. Making and sweeping happen
under one lock, so that none is swept between its making and its holding. Concurrency: blocks; call it at start-up.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ipfsfuse.cache.store import hold


def nest(parent: Path | None = None) -> Path:
    """Where the isolated folders of this user lie."""
    return (parent or Path(tempfile.gettempdir())) / f"ipfsfuse-isolated-{os.geteuid()}"


@contextlib.contextmanager
def isolated_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new cache folder, held; deleted at the end. Raises StoreFailed."""
    home = nest(parent)
    hold.prepare(home)
    with contextlib.ExitStack() as held:
        with _alone(home):
            _sweep(home)
            folder = Path(tempfile.mkdtemp(dir=home))
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            held.enter_context(hold.hold(folder))
        yield folder


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    with hold.as_store_failed(f"{home} can't be used"):
        file = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _sweep(home: Path) -> None:
    for folder in home.iterdir():
        if hold.is_free(folder):
            shutil.rmtree(folder, ignore_errors=True)
