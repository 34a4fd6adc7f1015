"""Inode numbers: who has which, for as long as the kernel remembers it. Pure: no FUSE, no clock.

Files and symlinks have one inode per CID, whatever path or spelling led there: they share the page cache. Directories
have one per path, because the kernel moves a directory's dentry that shows up at a second name. Numbers come from the
CID (and for a directory from its path), so they are the same after a restart; a number that something else holds is
never given: the next free one is taken.
"""

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from ipfsfuse.dag.cid import Cid, canonical, multihash
from ipfsfuse.vfs.attributes import Attributes

ROOT = 1
_MASK = (1 << 63) - 1


@dataclass(slots=True)
class Inode:
    """One number, and what it stands for."""

    number: int
    cid: Cid
    """As first spelled; b"" for the mount's root."""
    key: Hashable
    attributes: Attributes
    parent: int = ROOT
    """Of a directory: the number of the one it is in."""
    lookups: int = 0
    """References that the kernel holds."""
    opens: int = 0
    """Open files, those being opened among them."""


class Inodes:
    """The table. Every reference counted in `lookups` is given back through `forget`."""

    def __init__(self, root: Attributes, pending: Callable[[int], bool] = lambda _number: False) -> None:
        """`pending` tells whether something is still on its way to a number that the kernel gave back."""
        self._pending = pending
        held = Inode(ROOT, Cid(b""), "root", root, lookups=1)
        self._by_number: dict[int, Inode] = {ROOT: held}
        self._by_key: dict[Hashable, Inode] = {held.key: held}

    def __len__(self) -> int:
        return len(self._by_number)

    def get(self, number: int) -> Inode:
        """The inode of a number that the kernel holds."""
        return self._by_number[number]

    def known(self, number: int) -> Inode | None:
        """The inode of a number, if the kernel holds it still."""
        return self._by_number.get(number)

    def find(self, cid: Cid) -> Inode | None:
        """The inode of a file, if the kernel holds it."""
        return self._by_key.get(canonical(cid))

    def file(self, cid: Cid, attributes: Attributes) -> Inode:
        """The one inode of a file or symlink, for all its paths and spellings."""
        key = canonical(cid)
        found = self._by_key.get(key)
        if found is None:
            return self._new(key, cid, attributes, likely(cid))
        if attributes.exact and not found.attributes.exact:
            found.attributes = attributes
        return found

    def directory(self, parent: int, name: bytes, cid: Cid, attributes: Attributes) -> Inode:
        """The inode of the directory `name` in `parent`: of that path alone."""
        key = (parent, name)
        found = self._by_key.get(key)
        if found is None:
            path = hashlib.blake2b(parent.to_bytes(8, "big") + name + b"/" + cid, digest_size=8)
            found = self._new(key, cid, attributes, int.from_bytes(path.digest(), "big") & _MASK)
            found.parent = parent
        return found

    def _new(self, key: Hashable, cid: Cid, attributes: Attributes, number: int) -> Inode:
        while number <= ROOT or number in self._by_number or self._pending(number):
            number = number + 1 & _MASK
        made = self._by_number[number] = self._by_key[key] = Inode(number, cid, key, attributes)
        return made

    def forget(self, number: int, count: int) -> bool:
        """The kernel gives `count` references back; with the last one the number is free: True."""
        inode = self._by_number.get(number)
        if inode is None or number == ROOT:
            return False
        inode.lookups -= count
        if inode.lookups > 0:
            return False
        del self._by_number[number], self._by_key[inode.key]
        return True


def likely(cid: Cid) -> int:
    """The number that a file of this CID gets if nothing else holds it."""
    return max(int.from_bytes(multihash(cid)[-8:], "big") & _MASK, ROOT + 1)
