"""`ipfsfuse export`: writes a DAG to a CAR file. Every block is verified.

Concurrency: one task per export. Some blocks are fetched ahead, side by side, and all are written in one
order. The file appears at the end, complete.
"""

import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.traversal import BlockWalk
from ipfsfuse.errors import IpfsFuseError, StoreFailed, Unsupported
from ipfsfuse.fileio import threads
from ipfsfuse.sources.local.car_writer import CarWriter

_FETCHED_AHEAD = 16
"""Blocks fetched side by side."""

GetBlock = Callable[[Cid], Awaitable[bytes]]
ExportProgress = Callable[[int, int], None]
"""Called with (blocks, bytes) written so far."""


async def export(
    root: Cid, get: GetBlock, file: Path, indexed: bool = False, progress: ExportProgress | None = None
) -> int:
    """Writes everything below `root` to `file`: a CARv1, or a CARv2 with its index if `indexed`.

    Each block is written once, parents first, and links in their order, as `ipfs dag export` does. Returns
    the bytes of CAR data.

    Raises what `get` raises, WrongBlock, Malformed, Unsupported for a codec whose links can't be known,
    StoreFailed.
    """
    with _appearing(file) as fd:
        return await _fill(CarWriter(fd, file.parent, [root], indexed), root, get, progress)


async def export_to_stream(root: Cid, get: GetBlock, fd: int, progress: ExportProgress | None = None) -> int:
    """As `export`, to a descriptor that may be a pipe: a CARv1. Whoever reads it must look at how this
    process ends, because a CAR that ends early can be a valid CAR.

    Raises BrokenPipeError where nobody reads any more, and what `export` raises."""
    try:
        return await _fill(
            CarWriter(fd, Path(tempfile.gettempdir()), [root], indexed=False), root, get, progress
        )
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise StoreFailed(f"standard output: {exc.strerror}") from exc


async def _fill(writer: CarWriter, root: Cid, get: GetBlock, progress: ExportProgress | None) -> int:
    try:
        await _write(root, get, writer, progress)
        await threads.run_sync(writer.finish)
    except BaseException:
        writer.abandon()
        raise
    return writer.size


@contextmanager
def _appearing(file: Path) -> Iterator[int]:
    """A file to write to. It gets the name `file` at the end, if nothing failed."""
    try:
        if file.exists() and not file.is_file():  # else root would replace /dev/null itself
            raise StoreFailed(f"{file} exists and is not a file: name another")
        fd, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
        try:
            yield fd
            os.fchmod(fd, 0o666 & ~_umask())
            os.rename(temporary, file)
        finally:
            Path(temporary).unlink(missing_ok=True)
            os.close(fd)
    except OSError as exc:
        raise StoreFailed(f"{file}: {exc.strerror}") from exc


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


async def _write(root: Cid, get: GetBlock, writer: CarWriter, progress: ExportProgress | None) -> None:
    walk = BlockWalk([root], None)
    written: set[bytes] = set()
    fetched: dict[Cid, bytes] = {}
    for cid, _state in walk:
        if cid not in fetched:
            await _fetch([cid, *walk.upcoming(_FETCHED_AHEAD - 1)], get, fetched)
        block = fetched.pop(cid)
        below = _links(cid, block)
        walk.add(below, None)
        multihash = cids.multihash(cid)
        if multihash in written or (not below and cids.inline(cid) is not None):
            continue
        written.add(multihash)
        await threads.run_sync(writer.add, cid, block)
        if progress is not None:
            progress(writer.blocks, writer.size)


def _links(cid: Cid, block: bytes) -> list[Cid]:
    if cids.codec(cid) not in (cids.RAW, cids.DAG_PB, cids.DAG_CBOR):
        raise Unsupported(f"{cids.text(cid)}: the links of a {cids.codec_name(cid)} block can't be read")
    return nodes.links(cid, block)


async def _fetch(wanted: list[Cid], get: GetBlock, fetched: dict[Cid, bytes]) -> None:
    """Adds the verified blocks of `wanted` to `fetched`. Raises only for the first: the others are fetched
    again when it is their turn."""
    failure: list[IpfsFuseError] = []

    async def one(cid: Cid) -> None:
        try:
            block = await get(cid)
            await threads.run_sync(cids.verify, cid, block)
            fetched[cid] = block
        except IpfsFuseError as exc:
            if cid == wanted[0]:
                failure.append(exc)

    async with trio.open_nursery() as nursery:
        for cid in dict.fromkeys(wanted):
            if cid not in fetched:
                nursery.start_soon(one, cid)
    if failure:
        raise failure[0]
