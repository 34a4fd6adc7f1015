"""CAR files of DAGs: `export` writes one, `import_car` adds one to the library, `car_damage` and
`library_damage` check a CAR file or the library. Every block is verified.

Concurrency: one task per export. Some blocks are fetched ahead in parallel, and all are written in a fixed
order. The file appears when it is complete. The other functions block, for one thread each.
"""

import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import file_layout, nodes, values
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Node, Shard, Symlink, parse, prefix_length
from ipfsfuse.dag.path import IpfsPath
from ipfsfuse.dag.traversal import BlockWalk, drive, resolve
from ipfsfuse.errors import (
    AddFailed,
    IpfsFuseError,
    IsADirectory,
    NotHere,
    SourceFailed,
    StoreFailed,
    Unsupported,
)
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import too_large
from ipfsfuse.sources.local.car_file import CarFile, ensure_index
from ipfsfuse.sources.local.car_writer import CarWriter
from ipfsfuse.sources.local.library import Library, NewRoot
from ipfsfuse.sources.local.library_folder import damaged_roots, lost_packs, read_root, store_errors

_FETCHED_AHEAD = 16
"""Blocks that are fetched in parallel."""

GetBlock = Callable[[Cid], Awaitable[bytes]]
CarProgress = Callable[[int], None]
"""Called with the bytes done so far."""


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
        return await _fill(CarWriter(fd, file.parent, [root], indexed), root, get, progress)


async def export_to_stream(root: Cid, get: GetBlock, fd: int, progress: CarProgress | None = None) -> int:
    """Writes a CARv1 to a descriptor, which may be a pipe. Its reader must check the exit code of this
    process, because a CAR that ends early can be a valid CAR.

    Raises BrokenPipeError if the reader is gone, and what `export` raises."""
    try:
        return await _fill(
            CarWriter(fd, Path(tempfile.gettempdir()), [root], indexed=False), root, get, progress
        )
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


def links(cid: Cid, block: bytes) -> list[Cid]:
    """The links of a block. Raises Malformed, and Unsupported for a codec whose links can't be read."""
    if cids.codec(cid) not in (cids.RAW, cids.DAG_PB, *values.SHOWN_CODECS):
        raise Unsupported(f"{cids.text(cid)}: the links of a {cids.codec_name(cid)} block can't be read")
    return nodes.links(cid, block)


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


# -- import --------------------------------------------------------------------------------------------------


def import_car(file: Path, library: Library, progress: CarProgress) -> list[NewRoot]:
    """Adds the DAGs of all roots of a CAR file to `library`. Returns the roots.

    Blocks that the CAR lacks may be in the library already. If a block is in neither, or is wrong, the
    library is unchanged. Raises AddFailed, StoreFailed.
    """
    with _open_car(file) as car, library.open_writer() as writer:
        if not car.roots:
            raise AddFailed(f"{file} names no roots: the library would not know what to keep")

        def get(cid: Cid) -> bytes:
            location = car.find(cids.multihash(cid))
            if location is None:
                try:
                    return library.block(cid)
                except NotHere as exc:
                    raise NotHere(f"{cids.text(cid)} is neither in the CAR nor in the library") from exc
            if location.size > cids.MAX_BLOCK:
                raise too_large(file.name, cid, location.size)
            return car.read(location)

        done = 0
        roots: list[NewRoot] = []
        for root in dict.fromkeys(car.roots):
            walk, size = BlockWalk([root], None), 0
            for cid, _state in walk:
                try:
                    block = _verified(cid, get)
                    walk.add(links(cid, block), None)
                except IpfsFuseError as exc:
                    raise AddFailed(f"{file}: nothing was imported: {exc}") from exc
                writer.put(cid, block)
                size += len(block)
                progress(done + size)
            done += size
            roots.append(NewRoot(root, file.stem, size))
        writer.commit(roots)
    library.tidy()
    return roots


@contextmanager
def _open_car(file: Path) -> Iterator[CarFile]:
    """Opens a CAR file with its index. If it has none, builds one in a temporary folder. Raises AddFailed."""
    with tempfile.TemporaryDirectory(prefix="ipfsfuse-") as indexes:
        try:
            if not file.is_file():
                raise AddFailed(f"{file}: not a file: give a CAR file")
            car = CarFile(file)
        except (OSError, SourceFailed) as exc:
            raise AddFailed(str(exc)) from exc
        try:
            ensure_index(car, Path(indexes), None)
            yield car
        except SourceFailed as exc:
            raise AddFailed(str(exc)) from exc
        finally:
            car.close()


def _verified(cid: Cid, get: Callable[[Cid], bytes]) -> bytes:
    """Raises what `get` raises, WrongBlock."""
    block = cids.inline_or_empty_block(cid)
    if block is None:
        block = get(cid)
        cids.verify(cid, block)
    return block


# -- checking ------------------------------------------------------------------------------------------------


def _damage(
    roots: Sequence[tuple[Cid, str]], get: Callable[[Cid], bytes], progress: CarProgress
) -> Iterator[tuple[str, str]]:
    """Verifies every block below `roots` (CID, name to show). Yields (path, reason) of each missing or wrong
    block. `get` returns an unverified block, and raises IpfsFuseError."""
    walk = BlockWalk((), "")
    done = 0
    for root, name in roots:
        walk.add([root], name)
        for cid, path in walk:
            try:
                block = _verified(cid, get)
                named = _named_links(cid, block)
            except IpfsFuseError as exc:
                yield path, str(exc)
                continue
            done += len(block)
            progress(done)
            for child, entry in reversed(named):
                walk.add([child], f"{path}/{entry}" if entry else path)


def _named_links(cid: Cid, block: bytes) -> list[tuple[Cid, str]]:
    """The links of a block, each with the name of its entry; "" for a link that is not an entry."""
    try:
        node = parse(cid, block) if cids.codec(cid) == cids.DAG_PB else None
    except IpfsFuseError:
        node = None
    if not isinstance(node, Directory | Shard):
        return [(child, "") for child in nodes.links(cid, block)]
    pad = prefix_length(node.width) if isinstance(node, Shard) else 0
    return [(link.cid, link.name[pad:].decode("utf-8", "replace")) for link in node.links]


def library_damage(library: Library, progress: CarProgress) -> Iterator[tuple[str, str]]:
    """(path, reason) of each root that can't be read, and of each missing or wrong block below the others.
    Verifies every block."""
    entries = library.entries()
    for path in damaged_roots(library.folder, entries):
        yield path.name, f"{path} can't be read: add its content again, or remove that file"
    with store_errors(f"the library {library.folder}"):
        lost = lost_packs(library.folder, entries)
    for path, pack in lost:
        now = read_root(path)
        if now is None or pack not in now.packs:
            continue  # another process has removed the root, or merged its packs
        how = "add its content again, or remove this root"
        yield path.name, f"{path} names the pack {pack}, which is not there: {how}"
    roots = [(entry.cid, f"{cids.text(entry.cid)} {entry.name}".rstrip()) for entry in entries]
    yield from _damage(roots, library.block, progress)


def car_damage(file: Path, progress: CarProgress) -> Iterator[tuple[str, str]]:
    """The same for the DAGs of all roots of a CAR file. Raises AddFailed if it is not a CAR."""
    with _open_car(file) as car:

        def get(cid: Cid) -> bytes:
            location = car.find(cids.multihash(cid))
            if location is None:
                raise NotHere(f"{cids.text(cid)} is not in the CAR")
            return car.read(location)

        yield from _damage([(root, cids.text(root)) for root in car.roots], get, progress)
