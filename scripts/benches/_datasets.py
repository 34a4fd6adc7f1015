"""The files for measuring mounts. They are made once, in a folder of the user's cache, and are the same on
every machine."""

import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Scale:
    """The sizes. docs/PERFORMANCE.md has the results for the full one."""

    name: str
    big: int
    """MiB of the large file."""
    names: int
    """Files in one directory."""
    folders: int
    """Directories of FILES_EACH small files."""
    forgotten: int
    """Inodes that are looked up and forgotten."""


FULL = Scale("full", 1024, 10_000, 200, 1_000_000)
SMALL = Scale("small", 64, 1_000, 20, 20_000)
FILES_EACH = 50


def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ipfsfuse-bench"


def make(scale: Scale) -> Path:
    """The data sets `big`, `names`, `nodes` and `tree`, below the folder returned."""
    top = folder() / scale.name
    for name, fill in (("big", _big), ("names", _names), ("nodes", _names), ("tree", _tree)):
        _once(top / name, scale, fill)
    return top


def _once(where: Path, scale: Scale, fill: Callable[[Path, Scale], None]) -> None:
    if where.exists():
        return
    print(f"making {where}", file=sys.stderr, flush=True)
    unfinished = where.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    fill(unfinished, scale)
    unfinished.rename(where)


def _big(where: Path, scale: Scale) -> None:
    content = random.Random(scale.big)
    with (where / "large").open("wb") as out:
        for _ in range(scale.big):
            out.write(content.randbytes(MIB))
    (where / "1MiB").write_bytes(content.randbytes(MIB))


def _names(where: Path, scale: Scale) -> None:
    for number in range(scale.names):
        (where / f"entry-{number:06}.txt").write_text(f"{where.name} {number}\n")


def _tree(where: Path, scale: Scale) -> None:
    content = random.Random(scale.folders)
    for number in range(scale.folders):
        below = where / f"folder-{number:03}"
        below.mkdir()
        for file in range(FILES_EACH):
            (below / f"file-{file:02}.bin").write_bytes(content.randbytes(content.randint(2 << 10, 20 << 10)))
