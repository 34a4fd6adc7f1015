"""CAR files and the library: `import_car` adds a CAR file to the library, `car_damage` and `library_damage`
check a CAR file or the library. Every block is verified. All calls block.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import nodes, values
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, Shard, parse, prefix_length
from ipfsfuse.dag.traversal import BlockWalk
from ipfsfuse.errors import AddFailed, IpfsFuseError, NotHere, SourceFailed, Unsupported
from ipfsfuse.sources.local.car_file import CarFile, ensure_index
from ipfsfuse.sources.local.library import Library, NewRoot
from ipfsfuse.sources.local.library_folder import damaged_roots, lost_packs, read_root, store_errors

CarProgress = Callable[[int], None]
"""Called with the bytes done so far."""


def links(cid: Cid, block: bytes) -> list[Cid]:
    """The links of a block. Raises Malformed, and Unsupported for a codec whose links can't be read."""
    if cids.codec(cid) not in (cids.RAW, cids.DAG_PB, *values.SHOWN_CODECS):
        raise Unsupported(f"{cids.text(cid)}: the links of a {cids.codec_name(cid)} block can't be read")
    return nodes.links(cid, block)


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
                raise cids.too_large(file.name, cid, location.size)
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
