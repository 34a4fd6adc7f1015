"""Checks that the tests of `add` share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import AddFailed, IpfsFuseError
from ipfsfuse.importer.add import Added, AddOptions, add
from ipfsfuse.sources.local.library import Library

PLAIN = AddOptions()


MIB = 1 << 20


def names_of(found: list[Added]) -> list[str]:
    return [added.name for added in found]


def content(library: Library, cid: Cid) -> object:
    """Reads a DAG back from the library and verifies each block. Returns bytes, or a dict of names."""
    block = library.block(cid)
    cids.verify(cid, block)
    if cids.codec(cid) == cids.RAW:
        return block
    node = dagpb.decode(block)
    if node.links and not node.links[0].name:
        return b"".join(
            bytes(child) for link in node.links if isinstance(child := content(library, link.cid), bytes)
        )
    return (
        {link.name.decode(): content(library, link.cid) for link in node.links}
        if node.data == b"\x08\x01"
        else node.data
    )


def snapshot(library: Library) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in library.folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def refuse(library: Library, path: Path, message: str, options: AddOptions = PLAIN) -> None:
    """Adding `path` fails with `message` and changes nothing."""
    before = snapshot(library)
    with pytest.raises(IpfsFuseError, match=message) as caught:
        list(add([str(path)], options, library))
    assert "\n" not in str(caught.value)
    assert snapshot(library) == before


def acting_at(done: int, act: Callable[[], object]) -> Callable[[int, int | None, str], None]:
    """A progress callback that calls `act` once, when `done` bytes were read."""
    acted: list[object] = []

    def report(now: int, _total: int | None, _path: str) -> None:
        if now >= done and not acted:
            acted.append(act())

    return report


def refuse_changed(library: Library, path: Path, act: Callable[[], object], message: str) -> None:
    """Adding `path` fails with `message` and changes nothing, if `act` is called meanwhile."""
    before = snapshot(library)
    with pytest.raises(AddFailed, match=message):
        list(add([str(path)], PLAIN, library, acting_at(MIB, act)))
    assert snapshot(library) == before


ADD_STDIN = """
import sys
from pathlib import Path
from ipfsfuse.importer.add import AddOptions, add
from ipfsfuse.dag import cid
from ipfsfuse.sources.local.library import Library
for added in add(["-"], AddOptions(wrap="-w" in sys.argv), Library(Path(sys.argv[1]))):
    print(cid.text(added.cid), added.name, flush=True)
"""
