"""A recorded run as one CAR: written, and read back with every block checked against its CID.

The root is a UnixFS folder, so that `ipfsfuse mount --from run.car` shows the run: receipt.json, guest.wasm,
stdin, ipfs/CID for each root that was used, dir/N for each folder that was given. A CAR is written whole or
not at all. Blocking; one at a time.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ipfsfuse.dag import builder, car, dagpb, file_layout
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import Built, Stored
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Leaf, Node, parse
from ipfsfuse.errors import Malformed, NotACid, StoreFailed, Unsupported, UsageError, WrongBlock
from ipfsfuse_run import receipt
from ipfsfuse_run.errors import ReceiptRefused

RECEIPT, GUEST, STDIN, IPFS, DIRS = "receipt.json", "guest.wasm", "stdin", "ipfs", "dir"
_PROFILE = builder.UNIXFS_V1_2025
MAX_BLOCK = 2 << 20
_MAX_HEADER = 64 << 10
_LEAF_BYTES = 64 << 10
_SPARE = 64
"""What `Writer` makes has leaves of 1 MiB. A file with more than _SPARE nodes and leaves beside one for each
_LEAF_BYTES was made to take long."""


# -- writing -------------------------------------------------------------------------------------------------


class Writer:
    """Puts blocks into a CAR, each once. `add_*` give what a folder can link."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._seen: set[Cid] = set()
        out.write(car.encode_header([_NO_ROOT]))

    def put(self, cid: Cid, block: bytes) -> None:
        if cid not in self._seen:
            self._seen.add(cid)
            self._out.write(car.section_head(cid, len(block)) + block)

    def add_file(self, file: BinaryIO, stored: Stored = builder.NOTHING) -> Built:
        profile = _PROFILE if stored == builder.NOTHING else _PROFILE.with_metadata()
        file_builder, first = builder.FileBuilder(profile, self.put), file.read(profile.chunk_size)
        second = file.read(profile.chunk_size)
        if not second:
            only = builder.leaf(profile, first, stored)
            self.put(only.built.cid, only.block)
            return only.built
        for chunk in (first, second, *iter(lambda: file.read(profile.chunk_size), b"")):
            leaf = builder.leaf(profile, chunk)
            self.put(leaf.built.cid, leaf.block)
            file_builder.add(leaf.built)
        return file_builder.finish(stored)

    def add_folder(self, children: Sequence[tuple[str, Built]], stored: Stored = builder.NOTHING) -> Built:
        return builder.directory(
            _PROFILE, [(os.fsencode(name), built) for name, built in children], stored, self.put
        )

    def add_tree(self, folder: Path) -> Built:
        """A folder of the host with its modes and times: what the guest could see of it. Raises StoreFailed,
        UsageError."""
        children: list[tuple[str, Built]] = []
        try:
            for entry in sorted(os.scandir(folder), key=lambda each: each.name):
                path, found = Path(entry.path), entry.stat(follow_symlinks=False)
                stored = Stored(found.st_mode & 0o7777, found.st_mtime_ns)
                if entry.is_symlink():
                    children.append(
                        (
                            entry.name,
                            builder.symlink(_PROFILE, os.fsencode(os.readlink(path)), stored, self.put),
                        )
                    )
                elif entry.is_dir():
                    children.append((entry.name, self.add_tree(path)))
                elif entry.is_file():
                    with path.open("rb") as file:
                        children.append((entry.name, self.add_file(file, stored)))
                else:
                    raise UsageError(f"{path} is neither file, folder nor symlink: it can't be recorded")
            found = folder.stat()
        except OSError as exc:
            raise StoreFailed(f"{exc.filename or folder} can't be recorded: {exc.strerror}") from exc
        return self.add_folder(children, Stored(found.st_mode & 0o7777, found.st_mtime_ns))

    def close(self, root: Built) -> None:
        self._out.seek(0)
        self._out.write(car.encode_header([root.cid]))


_NO_ROOT = Cid(b"\x01\x70\x12\x20" + bytes(32))
"""As long as every root that is written here: the header's place is kept by it."""


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well: only its owner can read it, for a
    record holds what was in variables, in arguments and on standard input. Raises StoreFailed."""
    part = path.with_name(f".{path.name[:200]}.{os.urandom(8).hex()}.part")
    try:
        file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(file, "w+b") as out:
            yield out
        part.replace(path)
    except OSError as exc:
        raise StoreFailed(f"{path} can't be written: {exc.strerror}") from exc
    finally:
        part.unlink(missing_ok=True)


def cid_of(file: BinaryIO) -> Cid:
    """The CID that `file` has in a record; it is read from its start."""
    file.seek(0)
    with open(os.devnull, "wb") as nowhere:
        return Writer(nowhere).add_file(file).cid


def links(cid: Cid, block: bytes) -> Iterable[Cid]:
    """What a verified block links to; nothing for one that is no dag-pb node."""
    if cids.codec(cid) != cids.DAG_PB:
        return ()
    with contextlib.suppress(Malformed):
        return [each.cid for each in dagpb.decode(block).links]
    return ()


# -- reading -------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    offset: int
    size: int


class Bundle:
    """A CAR that was read once from end to end: every block in it is what its CID says. Keeps places, not
    blocks, and looks again whenever it gives one: the file may have been changed since."""

    def __init__(self, path: Path) -> None:
        """Raises ReceiptRefused."""
        self.path = path
        self.size = 0
        """Bytes of the CAR file."""
        self._places: dict[bytes, Place] = {}
        try:
            self._file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115 # closed by `close`
        except OSError as exc:
            raise ReceiptRefused(f"{path} can't be read: {exc.strerror}") from exc
        try:
            self._root = self._index()
        except OSError as exc:
            self._file.close()
            raise ReceiptRefused(f"{path} can't be read: {exc.strerror}") from exc
        except (Malformed, NotACid, WrongBlock, Unsupported) as exc:
            self._file.close()
            raise ReceiptRefused(f"{path} is not an intact record of a run: {exc}") from exc

    def close(self) -> None:
        self._file.close()

    def _index(self) -> Cid:
        self.size = os.fstat(self._file.fileno()).st_size
        at = car.header_length(self._file.read(9))
        if at > _MAX_HEADER:
            raise Malformed(f"its header has {at} bytes: a run's has fewer than 100")
        self._file.seek(0)
        roots = car.decode_header(self._file.read(at))
        if len(roots) != 1:
            raise Malformed(f"{len(roots)} roots where a run has one")
        while at < self.size:
            head = os.pread(self._file.fileno(), car.HEAD_BYTES, at)
            found = car.section(head, at=0, base=at)
            if found.end > self.size:
                raise Malformed("it is cut short")
            place = Place(found.block, found.end - found.block)
            if place.size > MAX_BLOCK:
                raise Malformed(f"a block of {place.size} bytes: {MAX_BLOCK} are the most")
            cids.verify(found.cid, self._at(place))
            if cids.inline(found.cid) is None:
                self._places[cids.multihash(found.cid)] = place
            at = found.end
        return roots[0]

    def _at(self, place: Place) -> bytes:
        return os.pread(self._file.fileno(), place.size, place.offset)

    def __contains__(self, cid: Cid) -> bool:
        return cids.inline(cid) is not None or cids.multihash(cid) in self._places

    def block(self, cid: Cid) -> bytes:
        """Raises ReceiptRefused where it is not there, or not there any more."""
        inline = cids.inline(cid)
        if inline is not None:
            return inline
        try:
            block = self._at(self._places[cids.multihash(cid)])
            cids.verify(cid, block)
        except KeyError as exc:
            raise ReceiptRefused(f"{self.path} lacks the block {cids.text(cid)}") from exc
        except (OSError, WrongBlock) as exc:
            raise ReceiptRefused(f"{self.path} was changed while it was read: {exc}") from exc
        return block

    def node(self, cid: Cid) -> Node:
        try:
            return parse(cid, self.block(cid))
        except (Malformed, Unsupported) as exc:
            raise ReceiptRefused(f"{self.path}: {exc}") from exc

    def find(self, *names: str) -> Cid | None:
        """The CID at a path below the root; None where there is none."""
        cid = self._root
        for name in names:
            node = self.node(cid)
            found = node.by_name.get(os.fsencode(name)) if isinstance(node, Directory) else None
            if found is None:
                return None
            cid = found.cid
        return cid

    def file(self, cid: Cid) -> File:
        """Raises ReceiptRefused."""
        node = self.node(cid)
        if not isinstance(node, File):
            raise ReceiptRefused(f"{self.path}: {cids.text(cid)} is not a file")
        return node

    def content(self, cid: Cid, most: int) -> Iterator[bytes]:
        """The bytes of the file `cid`, by leaf. Raises ReceiptRefused, for a file of more than `most` bytes
        too: its size is what its blocks say, and a few of them can say anything."""
        file, offset = self.file(cid), 0
        if file.size > most:
            raise ReceiptRefused(f"{self.path}: a file in it has {file.size} bytes: {most} are the most")
        left = _SPARE + file.size // _LEAF_BYTES
        while offset < file.size:
            try:
                found, opened = self._leaves(file, offset, left)
                left -= opened + len(found)
                if left < 0 or not found:
                    raise Malformed(
                        f"{cids.brief(cid)}: it is cut into more pieces than a record's files are"
                    )
                for leaf in found:
                    yield bytes(file_layout.leaf_content(leaf, self.block(leaf.cid)))
                    offset = leaf.offset + leaf.size
            except (Malformed, Unsupported) as exc:
                raise ReceiptRefused(f"{self.path}: {exc}") from exc

    def _leaves(self, file: File, offset: int, most: int) -> tuple[list[Leaf], int]:
        """The next leaves from `offset` on, and how many nodes were opened for them: little more than
        `most`."""
        walk, opened = file_layout.leaves(file, offset, file.size - offset, sure=True), 0
        try:
            wanted = next(walk)
            while opened <= most:
                opened += len(wanted)
                wanted = walk.send([self.node(each) for each in wanted])
        except StopIteration as stop:
            found: list[Leaf] = stop.value
            return found, opened
        return [], opened

    def receipt(self, cid: Cid) -> bytes:
        """The bytes of a receipt: never more than the CAR file has. Raises ReceiptRefused."""
        return b"".join(self.content(cid, min(receipt.MAX_BYTES, self.size)))
