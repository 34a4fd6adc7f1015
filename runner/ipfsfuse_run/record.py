"""The CAR file of a recorded run: writes it, reads it, and compares it with the receipt in it. Also CAR files
of a folder of the host: results in /out, or a folder of --dir.

The root of a record is a UnixFS directory, so that `ipfsfuse mount --from run.car` shows the run:
receipt.json, guest.wasm, stdin, stdout, stderr, out, dir/N for each folder of --dir, signature.json, and
ipfs/CID for each root that was used. The record has every block that its root links to, directly or not, so
that a node can pin it. It has only some blocks of what the run read, so ipfs/CID is not linked: it is a
symlink to that CID in the mount. (Format 1 links it.) A CAR is written completely or not at all. Every block
is checked against its CID when it is read.
"""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from ipfsfuse.dag import builder, car, file_layout
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import Built, Stored
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Leaf, Node, Shard, Symlink, parse
from ipfsfuse.errors import Malformed, NotACid, StoreFailed, Unsupported, WrongBlock
from ipfsfuse_run import read_paths, receipts
from ipfsfuse_run.errors import ReceiptRefused
from ipfsfuse_run.files import open_to_read
from ipfsfuse_run.growth import NAME_BYTES
from ipfsfuse_run.receipts import Digest, Receipt

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_PROFILE = builder.UNIXFS_V1_2025
MAX_UNSIZED = 64 << 20
"""The most bytes that are read from a file whose size is 0, as in /proc: such a file may have no end."""
_MAX_HEADER = 64 << 10
_LEAF_BYTES = 64 << 10
_MAX_PATH = 4096
_SPARE_NODES = 64
"""A file may have one node or leaf for each _LEAF_BYTES, and _SPARE_NODES more. `RecordWriter` makes leaves
of 1 MiB, so a file with more of them was made to take long and is refused."""


# -- writing -----------------------------------------------------------------------------------------------

_NO_ROOT = Cid(b"\x01\x70\x12\x20" + bytes(32))
"""Reserves the space for the root in the header: it is as long as every root that is written here."""


class Readable(Protocol):
    """A file, or an object that reads like one."""

    def read(self, size: int, /) -> bytes: ...


class RecordWriter:
    """Writes a CAR file, each block once. `add_*` return what a folder can link."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._seen: set[Cid] = set()
        out.write(car.encode_header([_NO_ROOT]))

    def put(self, cid: Cid, block: bytes | memoryview) -> None:
        if cid not in self._seen:
            self._seen.add(cid)
            self._out.write(car.section_head(cid, len(block)) + block)

    def add_file(self, file: Readable, stored: Stored = builder.NO_ATTRIBUTES) -> Built:
        profile = _PROFILE if stored == builder.NO_ATTRIBUTES else _PROFILE.with_metadata()
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

    def add_folder(
        self, children: Sequence[tuple[str, Built]], stored: Stored = builder.NO_ATTRIBUTES
    ) -> Built:
        return builder.directory(
            _PROFILE, [(os.fsencode(name), built) for name, built in children], stored, self.put
        )

    def add_symlink(self, target: str, stored: Stored = builder.NO_ATTRIBUTES) -> Built:
        return builder.symlink(_PROFILE, os.fsencode(target), stored, self.put)

    def close(self, root: Built) -> None:
        self._out.seek(0)
        self._out.write(car.encode_header([root.cid]))


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` when the `with` block succeeds. Only its owner can read it, because a
    record contains variables, arguments and standard input. Raises StoreFailed."""
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


class Tree(NamedTuple):
    """A folder in a CAR file. `files` are the paths of its files, with their SHA-256."""

    built: Built
    files: Sequence[tuple[str, str]]


class _Level(NamedTuple):
    """A folder that is being read."""

    path: str
    stored: Stored
    names: list[str]
    children: list[tuple[str, Built]]


def add_tree(writer: RecordWriter, folder: str, bound: int | None) -> Tree:
    """Adds a folder of the host to a CAR file. With `bound`, the folder holds results of at most `bound`
    bytes, and gets the CID that `ipfsfuse add --hidden` gives it. Without, it is a folder of --dir, and modes
    and times are stored.

    A guest may leave anything: no symlink is followed, no device or pipe is opened, and each name counts
    NAME_BYTES. Another guest may use the same folder and put symlinks into it meanwhile: files outside the
    folder are refused. Raises StoreFailed."""
    taken = 0
    files: list[tuple[str, str]] = []
    top = os.path.realpath(folder)
    inside = ""

    def attributes(found: os.stat_result) -> Stored:
        return (
            builder.NO_ATTRIBUTES if bound is not None else Stored(found.st_mode & 0o7777, found.st_mtime_ns)
        )

    def count(size: int) -> None:
        nonlocal taken
        taken += size
        if bound is not None and taken > bound:
            raise StoreFailed(f"the results in {folder} are more than max-out={bound} bytes")

    try:
        stack = [_Level("", attributes(os.stat(top)), _names(top), [])]
        while True:
            level = stack[-1]
            if not level.names:
                stack.pop()
                built = writer.add_folder(level.children, level.stored)
                if not stack:
                    return Tree(built, sorted(files))
                stack[-1].children.append((os.path.basename(level.path), built))
                continue
            name = level.names.pop()
            inside = os.path.join(level.path, name)
            path = os.path.join(top, inside)
            with _place(path) as (fd, opened):
                found = os.fstat(fd)
                stored = attributes(found)
                count(NAME_BYTES + (found.st_size if stat.S_ISREG(found.st_mode) else 0))
                if bound is not None:
                    inside.encode()
                if stat.S_ISDIR(found.st_mode):
                    stack.append(_Level(inside, stored, _names(opened), []))
                elif stat.S_ISLNK(found.st_mode):
                    level.children.append((name, writer.add_symlink(os.readlink("", dir_fd=fd), stored)))
                elif stat.S_ISREG(found.st_mode):
                    with open_to_read(opened) as file:
                        hashed = _Hashed(file, found.st_size or MAX_UNSIZED + 1)
                        level.children.append((name, writer.add_file(hashed, stored)))
                    if not found.st_size:
                        count(hashed.size)
                        if hashed.size > MAX_UNSIZED:
                            raise StoreFailed(
                                f"{path!r} says that it is empty, and gives more than {MAX_UNSIZED} bytes: "
                                "it can't be taken"
                            )
                    files.append((inside, hashed.sha256.hexdigest()))
                else:
                    raise StoreFailed(f"{path!r} is neither file, folder nor symlink: it can't be taken")
    except UnicodeEncodeError as exc:
        raise StoreFailed(f"{inside!r} in the results has a name that is not UTF-8") from exc
    except OSError as exc:
        raise StoreFailed(f"{inside!r:.300} in {folder} can't be read: {exc.strerror}") from exc


@contextlib.contextmanager
def _place(path: str) -> Iterator[tuple[int, str]]:
    """The file at `path`, if no part of `path` is a symlink: a descriptor (O_PATH), and a path by which it
    can be opened. Raises OSError, StoreFailed."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        opened = f"/proc/self/fd/{fd}"
        if os.readlink(opened) != path:
            raise StoreFailed(f"{path!r} was moved or replaced while it was taken")
        yield fd, opened
    finally:
        os.close(fd)


def _names(folder: str) -> list[str]:
    return sorted(os.listdir(folder), reverse=True)


class _Hashed:
    """Hashes a file while it is read. Reads no more than `most` bytes."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self._file, self._most, self.sha256 = file, most, hashlib.sha256()
        self.size = 0
        """Bytes read so far."""

    def read(self, size: int) -> bytes:
        data: bytes | None = self._file.read(min(size, self._most - self.size))
        if data is None:  # files such as /proc/kmsg have no data now, and the file was opened without waiting
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.size += len(data)
        self.sha256.update(data)
        return data


def tree_cid(folder: str, bound: int) -> Cid:
    """The CID of the results in `folder`. Raises StoreFailed."""
    with open(os.devnull, "wb") as nowhere:
        return add_tree(RecordWriter(nowhere), folder, bound).built.cid


# -- reading -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_car(path: Path) -> Iterator["Record"]:
    """The CAR file of a record. Its receipt is not checked. Raises ReceiptRefused."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_to_read(path))
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ReceiptRefused(f"{path} is not a file")
            record = Record(path, file)
        except OSError as exc:
            raise ReceiptRefused(f"{path} can't be read: {exc.strerror}") from exc
        except (Malformed, NotACid, WrongBlock, Unsupported) as exc:
            raise ReceiptRefused(f"{path} is not an intact record of a run: {exc}") from exc
        yield record


class BlockLocation(NamedTuple):
    offset: int
    size: int


class Record:
    """A CAR file. It is read once completely, and every block is verified. Keeps the places of blocks, not
    the blocks, and verifies a block again each time it returns it, because the file may have changed."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Raises OSError, and the exceptions of the decoders of CAR files and CIDs."""
        self.path = path
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        """Bytes of the CAR file."""
        self._locations: dict[bytes, BlockLocation] = {}
        self._root = self._index()

    def _index(self) -> Cid:
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
            location = BlockLocation(found.block, found.end - found.block)
            if location.size > cids.MAX_BLOCK:
                raise Malformed(f"a block of {location.size} bytes: {cids.MAX_BLOCK} are the most")
            cids.verify(found.cid, self._at(location))
            if cids.inline_block(found.cid) is None:
                self._locations[cids.multihash(found.cid)] = location
            at = found.end
        return roots[0]

    def _at(self, location: BlockLocation) -> bytes:
        return os.pread(self._file.fileno(), location.size, location.offset)

    def __contains__(self, cid: Cid) -> bool:
        return cids.inline_block(cid) is not None or cids.multihash(cid) in self._locations

    def block(self, cid: Cid) -> bytes:
        """Raises ReceiptRefused if the block is not there or has changed."""
        inline = cids.inline_block(cid)
        if inline is not None:
            return inline
        try:
            block = self._at(self._locations[cids.multihash(cid)])
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
        """The CID at a path below the root; None if there is none."""
        cid = self._root
        for name in names:
            node = self.node(cid)
            found = node.find(os.fsencode(name)) if isinstance(node, Directory) else None
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
        """The content of the file `cid`, leaf by leaf. Raises ReceiptRefused, also for a file of more than
        `most` bytes: a few blocks can claim any size."""
        file, offset = self.file(cid), 0
        if file.size > most:
            raise ReceiptRefused(f"{self.path}: a file in it has {file.size} bytes: {most} are the most")
        left = _SPARE_NODES + file.size // _LEAF_BYTES
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
        """The next leaves from `offset` on, and how many nodes were opened for them. Stops after `most`
        nodes: a few more may be opened."""
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

    def files(self, cid: Cid, most: int) -> Iterator[tuple[str, File | Symlink | None]]:
        """Paths and nodes below the folder `cid`, parents first; the node of a folder is None. The record may
        be hostile: each name counts NAME_BYTES and each file its size, and more than `most` bytes are
        refused. Raises ReceiptRefused."""
        stack = [("", cid)]
        while stack:
            path, at = stack.pop()
            if len(os.fsencode(path)) >= _MAX_PATH:
                raise ReceiptRefused(f"{self.path}: its results are nested more deeply than a path can say")
            node = self.node(at)
            if isinstance(node, Directory | Shard):
                if path:
                    yield path, None
                below = []
                for name, child in self._children(node):
                    most -= NAME_BYTES
                    if most < 0:
                        raise ReceiptRefused(f"{self.path}: its results are larger than max-out")
                    below.append((os.path.join(path, name), child))
                stack.extend(reversed(below))
                continue
            if not path:
                raise ReceiptRefused(f"{self.path}: its {receipts.OUT} is not a folder")
            most -= node.size if isinstance(node, File) else len(node.target)
            if most < 0:
                raise ReceiptRefused(f"{self.path}: its results are larger than max-out")
            yield path, node

    def _children(self, node: Directory | Shard) -> Iterator[tuple[str, Cid]]:
        """Names and CIDs of a plain or sharded folder. Raises ReceiptRefused for names that no folder of the
        host can have."""
        seen: set[bytes] = set()
        try:
            for cid, name in read_paths.entries(node, self.node):
                if name in seen or b"/" in name or b"\0" in name or name in (b"", b".", b".."):
                    raise Malformed(f"a folder holds the name {name!r:.80}")
                seen.add(name)
                yield name.decode(), cid
        except (Malformed, UnicodeDecodeError) as exc:
            raise ReceiptRefused(f"{self.path}: {exc}") from exc

    def extract(self, cid: Cid, folder: str, most: int) -> None:
        """Writes the content of the folder `cid` into the empty folder `folder`. Follows no symlink and
        replaces no file. Raises ReceiptRefused, StoreFailed."""
        try:
            for path, node in self.files(cid, most):
                at = os.path.join(folder, path)
                if node is None:
                    os.mkdir(at)
                elif isinstance(node, Symlink):
                    os.symlink(node.target, at)
                else:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                    with open(os.open(at, flags, 0o666), "wb") as out:
                        out.writelines(self.content(node.cid, most))
        except OSError as exc:
            if exc.errno == errno.ENAMETOOLONG:
                raise ReceiptRefused(f"{self.path}: its results hold a name that is too long here") from exc
            raise StoreFailed(f"{exc.filename or folder!s:.300} can't be written: {exc.strerror}") from exc

    def receipt(self, cid: Cid) -> bytes:
        """The bytes of a receipt. Raises ReceiptRefused, also if they are more than the CAR file has."""
        return b"".join(self.content(cid, min(receipts.MAX_RECEIPT, self.size)))


# -- checking ----------------------------------------------------------------------------------------------


def receipt_alone(path: Path) -> Receipt | None:
    """The receipt in a .json file; None if `path` is something else, such as a CAR. Raises ReceiptRefused."""
    try:
        with open_to_read(path) as file:
            data = file.read(1)
            if data != b"{" or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            return receipts.decode(data + file.read(receipts.MAX_RECEIPT))
    except ReceiptRefused as exc:
        raise ReceiptRefused(f"{path}: {exc}") from exc
    except OSError as exc:
        raise ReceiptRefused(f"{path} can't be read: {exc.strerror}") from exc


@contextlib.contextmanager
def open_record(path: Path) -> Iterator[tuple[Record, Receipt]]:
    """Opens a record, and checks that it has the guest and every block that its receipt names. Does not check
    the content of its streams (`check_content` does). Raises ReceiptRefused."""
    with open_car(path) as record:
        cid = record.find(receipts.RECEIPT)
        if cid is None:
            raise ReceiptRefused(f"{path} holds no {receipts.RECEIPT}: it is not a record of a run")
        receipt = receipts.decode(record.receipt(cid))
        _check_parts(record, receipt)
        yield record, receipt


def _check_parts(record: Record, receipt: Receipt) -> None:
    if record.find(receipts.GUEST) != receipt.guest:
        raise ReceiptRefused(f"{record.path}: its guest is not the one that its receipt names")
    for name, cid in receipt.contents.items():
        if record.find(name) != cid:
            raise ReceiptRefused(f"{record.path}: its {name} is not the one that its receipt names")
    if receipt.format > 1 and record.find(receipts.OUT) != receipt.out:
        raise ReceiptRefused(f"{record.path}: its results are not the ones that its receipt names")
    for cid in receipt.read:
        if cid not in record:
            raise ReceiptRefused(
                f"{record.path} is cut short: it lacks the block {cids.text(cid)} that the run read"
            )
    folder = record.find(receipts.DIRS)
    node = None if folder is None else record.node(folder)
    recorded = {link.name: link.cid for link in node.links} if isinstance(node, Directory) else {}
    for number, each in enumerate(receipt.dirs):
        if recorded.get(b"%d" % number) != each.cid:
            raise ReceiptRefused(
                f"{record.path}: its folder {each.guest} is not the one that its receipt names"
            )


def check_content(
    record: Record, receipt: Receipt, name: str, out: BinaryIO | None = None, most: int | None = None
) -> None:
    """Writes one of the recorded streams (STDIN, STDOUT, STDERR) to `out`. Raises ReceiptRefused unless it is
    the one that the receipt names.

    A stream of more than `most` bytes is refused; the default is the size of the CAR file and 64 MiB more."""
    recorded: Digest = getattr(receipt, name)
    found, size = hashlib.sha256(), 0
    cid = record.find(name)
    if cid is not None and record.file(cid).size == recorded.size:
        for data in record.content(cid, record.size + (64 << 20) if most is None else most):
            found.update(data)
            size += len(data)
            if out is not None:
                out.write(data)
    if Digest(found.hexdigest(), size) != recorded:
        raise ReceiptRefused(f"{record.path}: its {_STREAMS[name]} is not the one that its receipt names")


_STREAMS = {
    receipts.STDIN: "standard input",
    receipts.STDOUT: "standard output",
    receipts.STDERR: "standard error",
}


def check_signature(record: Record, receipt: Receipt, key: "Ed25519PublicKey", most: int) -> None:
    """Raises ReceiptRefused unless `key` signed the receipt and the results, which may have `most` bytes."""
    from ipfsfuse_run import signatures

    signature_cid, receipt_cid = record.find(receipts.SIGNATURE), record.find(receipts.RECEIPT)
    assert receipt_cid is not None
    if signature_cid is None:
        raise ReceiptRefused(f"{record.path} has no signature: {signatures.fingerprint(key)} did not sign it")
    envelope = b"".join(record.content(signature_cid, min(signatures.MAX_ENVELOPE, record.size)))

    def files() -> list[tuple[str, str]]:
        if receipt.out is None:
            return []
        return [
            (path, _sha256(record.content(node.cid, most)))
            for path, node in record.files(receipt.out, most)
            if isinstance(node, File)
        ]

    try:
        signatures.check(envelope, key, receipt, record.receipt(receipt_cid), files)
    except ReceiptRefused as exc:
        raise ReceiptRefused(f"{record.path}: {exc}") from exc


def _sha256(content: Iterator[bytes]) -> str:
    found = hashlib.sha256()
    for data in content:
        found.update(data)
    return found.hexdigest()
