"""The table of inodes that the kernel knows, and their numbers. Pure: no FUSE, no clock.

A file or symlink has one inode for each CID, for all its paths and spellings, so that they share the page
cache. A directory has one inode for each path, because the kernel moves a directory's dentry that appears at
a second name.

A number is a keyed hash (RFC 7693) of the CID, or of a directory's path. The key is random and stored in the
cache folder. So numbers are the same after a restart, and no one can make content whose numbers collide on
purpose. If another inode has the number, the hash is computed again with a counter in it.

Reference counts: the kernel counts one reference for each reply that gives it a node id (LOOKUP, and each
entry of READDIRPLUS except "." and ".."), and returns references by FORGET. `refer` must be called exactly
once for each such reply, but not for a reply that is an error, nor for an entry that did not fit into the
reply. A caller that is killed makes no difference: after the kernel has sent a request to us, it waits for
the reply and counts it (fs/fuse/dev.c, request_wait_answer). The kernel does not forget an inode that is
open: it keeps the inode until RELEASE is answered (fs/fuse/file.c, fuse_file_release). Generation numbers
stay 0, because a number is used again only after the kernel has forgotten it. After an unmount no FORGET
comes; the table ends with the mount.

Bound: an inode takes about 450 bytes here, and more in the kernel, which forgets inodes only when memory is
short. With more than `MAX_INODES`, a listing has names only (`full`), and the kernel is asked to forget
unused inodes (`surplus`).
"""

import hashlib
import logging
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import islice

from ipfsfuse.dag.cid import Cid, canonical
from ipfsfuse.vfs.tree import ROOT_ATTRIBUTES, Attributes

log = logging.getLogger("ipfsfuse.fuse")

ROOT_INODE = 1
KEY_BYTES = 32
MAX_INODES = 250_000
BITS = 63
"""Bits of a number: `opens.c` makes a file handle of a number and the highest bit."""

_FILE, _DIRECTORY = b"file", b"directory"


@dataclass(slots=True)
class Inode:
    """An inode that the kernel knows."""

    number: int
    cid: Cid
    """The CID in the spelling that was seen first; b"" for the root of the mount."""
    key: Hashable
    attributes: Attributes
    parent: int = ROOT_INODE
    """For a directory: the number of its parent directory."""
    lookups: int = 0
    """References that the kernel has."""
    opens: int = 0
    """Open files, and files that are being opened."""
    cached_opens: int = 0
    """Open files of more than one block that the kernel reads through its page cache."""


class Inodes:
    """The table of all inodes that the kernel has references to."""

    def __init__(self, key: bytes, bits: int = BITS, limit: int = MAX_INODES) -> None:
        """`key` has 32 bytes. Fewer `bits` make collisions likely: for tests."""
        self._hashers = {
            kind: hashlib.blake2b(digest_size=8, key=key, person=kind) for kind in (_FILE, _DIRECTORY)
        }
        self._limit = limit
        self._mask = (1 << bits) - 1
        root = Inode(ROOT_INODE, Cid(b""), "root", ROOT_ATTRIBUTES, lookups=1)
        self._by_number: dict[int, Inode] = {ROOT_INODE: root}
        self._by_key: dict[Hashable, Inode] = {root.key: root}

    def __len__(self) -> int:
        return len(self._by_number)

    @property
    def full(self) -> bool:
        """Whether a listing should give no new inodes. A lookup must give one."""
        return len(self._by_number) >= self._limit

    def surplus(self) -> list[int]:
        """The oldest numbers, to be forgotten by the kernel if they are unused: as many as are needed to go
        an eighth below the limit. The next call returns others, because these may be in use."""
        count = len(self._by_number) - self._limit * 7 // 8 if self.full else 0
        numbers = list(islice(self._by_number, 1, 1 + count))  # the first is the root
        for number in numbers:
            self._by_number[number] = self._by_number.pop(number)
        return numbers

    def get(self, number: int) -> Inode:
        """The inode `number`, which must be in the table."""
        return self._by_number[number]

    def known(self, number: int) -> Inode | None:
        """The inode `number`; None if it is not in the table."""
        return self._by_number.get(number)

    def find(self, cid: Cid) -> Inode | None:
        """The inode of a file or symlink; None if it is not in the table."""
        return self._by_key.get(canonical(cid))

    def file(self, cid: Cid, found: Attributes) -> Inode:
        """The one inode of a file or symlink, for all its paths and spellings."""
        key = canonical(cid)
        inode = self._by_key.get(key)
        if inode is None:
            return self._new(key, cid, found, _FILE, key)
        if found.exact and not inode.attributes.exact:
            inode.attributes = found
        return inode

    def directory(self, parent: int, name: bytes, cid: Cid, found: Attributes) -> Inode:
        """The inode of the directory `name` in `parent`. Other paths of the directory have others."""
        key = (parent, name, canonical(cid))
        inode = self._by_key.get(key)
        if inode is None:
            inode = self._new(key, cid, found, _DIRECTORY, _path(*key))
            inode.parent = parent
        return inode

    def likely(self, parent: int, name: bytes, cid: Cid) -> int:
        """The number to show for the entry `name` of a listing if its type is not known (d_ino): its number
        if it is in the table, otherwise the number that it will have if it is a file."""
        key = canonical(cid)
        held = self._by_key.get(key) or self._by_key.get((parent, name, key))
        return held.number if held is not None else self._hash(_FILE, key, 0)

    def refer(self, inode: Inode) -> None:
        """Counts a reference to `inode` that a reply gives to the kernel."""
        inode.lookups += 1

    def forget(self, number: int, count: int) -> Inode | None:
        """The kernel returns `count` references. Returns the inode if that was the last one: its number is
        free then."""
        if number == ROOT_INODE:
            return None
        inode = self._by_number.get(number)
        if inode is None or inode.lookups < count:
            log.error(
                "the kernel forgets inode %d %d times and holds it %d times",
                number,
                count,
                inode.lookups if inode else 0,
            )
        if inode is None:
            return None
        inode.lookups -= count
        return self.drop_unused(inode)

    def drop_unused(self, inode: Inode) -> Inode | None:
        """If the kernel has no reference to `inode`, removes it from the table and returns it."""
        if inode.lookups > 0 or inode.number == ROOT_INODE:
            return None
        del self._by_number[inode.number], self._by_key[inode.key]
        return inode

    def _new(self, key: Hashable, cid: Cid, found: Attributes, kind: bytes, hashed: bytes) -> Inode:
        tries = 0
        while (number := self._hash(kind, hashed, tries)) in self._by_number:
            tries += 1
        inode = self._by_number[number] = self._by_key[key] = Inode(number, cid, key, found)
        return inode

    def _hash(self, kind: bytes, hashed: bytes, tries: int) -> int:
        hasher = self._hashers[kind].copy()
        hasher.update(hashed + tries.to_bytes(8, "little") if tries else hashed)
        number = int.from_bytes(hasher.digest(), "little") & self._mask
        return number if number > ROOT_INODE else self._hash(kind, hashed, tries + (1 << 32))


def _path(parent: int, name: bytes, key: Cid) -> bytes:
    return parent.to_bytes(8, "little") + name + b"/" + key
