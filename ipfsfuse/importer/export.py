"""Writes DAGs into CAR files, and gives the content of one file. Every block is verified.

Concurrency: one task per export. Some blocks are fetched ahead in parallel, and all are written in a fixed
order. The file appears when it is complete.
"""

import io
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import file_layout, nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File, Node, Symlink, parse
from ipfsfuse.dag.path import IpfsPath
from ipfsfuse.dag.traversal import BlockWalk, drive, resolve
from ipfsfuse.errors import IpfsFuseError, IsADirectory, StoreFailed
from ipfsfuse.fileio import threads
from ipfsfuse.importer.cars import CarProgress, links
from ipfsfuse.sources.local.car_writer import CarWriter, SequentialWriter

_FETCHED_AHEAD = 16
"""Blocks that are fetched in parallel."""
_STREAM_BUFFER = 1 << 20

GetBlock = Callable[[Cid], Awaitable[bytes]]


async def export(
    root: Cid, get: GetBlock, file: Path, indexed: bool = False, progress: CarProgress | None = None
) -> int:
    """Writes the DAG `root` to `file`: a CARv1, or a CARv2 with its index if `indexed`.

    Each block is written once, parents first, and links in their order, as `ipfs dag export` does. Returns
    the number of bytes of CAR data.

    Raises what `get` raises, WrongBlock, Malformed, Unsupported for a codec whose links can't be known,
    StoreFailed.
    """
    with _appearing(file) as fd:
        return await _fill(CarWriter(SequentialWriter(fd), file.parent, [root], indexed), root, get, progress)


async def export_to_stream(root: Cid, get: GetBlock, fd: int, progress: CarProgress | None = None) -> int:
    """Writes a CARv1 to a descriptor, which may be a pipe. Its reader must check the exit code of this
    process, because a CAR that ends early can be a valid CAR.

    Raises BrokenPipeError if the reader is gone, and what `export` raises."""
    try:
        out = io.BufferedWriter(io.FileIO(fd, "wb", closefd=False), _STREAM_BUFFER)
        writer = CarWriter(out, Path(tempfile.gettempdir()), [root], indexed=False)
        return await _fill(writer, root, get, progress)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise StoreFailed(f"standard output: {exc.strerror}") from exc


async def _fill(writer: CarWriter, root: Cid, get: GetBlock, progress: CarProgress | None) -> int:
    try:
        await _write(root, get, writer, progress)
        await threads.run_sync(writer.finish)
    except BaseException:
        writer.abandon()
        raise
    return writer.size


@contextmanager
def _appearing(file: Path) -> Iterator[int]:
    """A temporary file to write to. It is renamed to `file` at the end, unless something failed."""
    try:
        if file.exists() and not file.is_file():  # otherwise root would replace /dev/null
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


async def _write(root: Cid, get: GetBlock, writer: CarWriter, progress: CarProgress | None) -> None:
    walk = BlockWalk([root], None)
    written: set[bytes] = set()
    fetched: dict[Cid, bytes] = {}
    for cid, _state in walk:
        if cid not in fetched:
            await _fetch([cid, *walk.upcoming(_FETCHED_AHEAD - 1)], get, fetched)
        block = fetched.pop(cid)
        below = links(cid, block)
        walk.add(below, None)
        multihash = cids.multihash(cid)
        if multihash in written or (not below and cids.inline_block(cid) is not None):
            continue
        written.add(multihash)
        await threads.run_sync(writer.add, cid, block)
        if progress is not None:
            progress(writer.size)


async def _fetch(wanted: list[Cid], get: GetBlock, fetched: dict[Cid, bytes]) -> None:
    """Adds the verified blocks of `wanted` to `fetched`. Raises only for the first one: the others are
    fetched again when they are needed."""
    failure: list[IpfsFuseError] = []

    async def one(cid: Cid) -> None:
        try:
            fetched[cid] = await verified(cid, get)
        except IpfsFuseError as exc:
            if cid == wanted[0]:
                failure.append(exc)

    async with trio.open_nursery() as nursery:
        for cid in dict.fromkeys(wanted):
            if cid not in fetched:
                nursery.start_soon(one, cid)
    if failure:
        raise failure[0]


# -- one file ------------------------------------------------------------------------------------------------

_WINDOW = 4 << 20
"""Bytes of a file whose leaves are listed together."""


async def verified(cid: Cid, get: GetBlock) -> bytes:
    """The block of `cid`. Raises what `get` raises, WrongBlock."""
    block = cids.inline_or_empty_block(cid)
    if block is None:
        block = await get(cid)
        await threads.run_sync(cids.verify, cid, block)
    return block


async def content(path: IpfsPath, get: GetBlock) -> AsyncIterator[memoryview]:
    """The content of the file at `path`, in pieces. Raises NotFound, NotADirectory, IsADirectory, and what
    `verified` and the parser raise."""

    async def fetch(wanted: Sequence[Cid]) -> list[Node]:
        return [await threads.run_sync(parse, cid, await verified(cids.block_of(cid), get)) for cid in wanted]

    node = await drive(resolve(path), fetch)
    if not isinstance(node, File):
        kind = "a symlink" if isinstance(node, Symlink) else "a directory"
        raise IsADirectory(f"{path} is {kind}: only a file has content")
    if nodes.holds_values(node.cid):
        block, number = cids.value_place(node.cid)
        found = await threads.run_sync(nodes.document, block, await verified(block, get))
        yield memoryview(found.content(number))
        return
    at = 0
    while at < node.size:
        for leaf in await drive(file_layout.leaves(node, at, _WINDOW, sure=True), fetch):
            yield file_layout.leaf_content(leaf, await verified(leaf.cid, get))
            at = leaf.offset + leaf.size
