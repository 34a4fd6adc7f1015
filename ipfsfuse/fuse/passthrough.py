"""Files that the kernel reads from their staging files itself.

The kernel's rules (fs/fuse/iomode.c, Linux 6.9 and later): of one inode all open files are passed through, by
one backing id, or none is; any other answer fails the open with EIO. So an inode that has a cached open stays
cached until its last release. It counts an open before we see the next request for that inode, and stops to
count it before it sends the RELEASE. So our counts are never behind its own.

Concurrency: the event loop's.
"""

import errno
import os
from dataclasses import dataclass

from ipfsfuse.cache.passthrough import PassthroughFiles
from ipfsfuse.cache.store.staging import Entry
from ipfsfuse.errors import MountFailed
from ipfsfuse.fuse import device
from ipfsfuse.fuse.inodes import Inode


@dataclass(slots=True)
class _Backing:
    """What one inode is open with."""

    inode: Inode
    entry: Entry
    backing: int
    opens: int = 0


class Passthrough:
    def __init__(self, files: PassthroughFiles) -> None:
        self._files = files
        self._by_inode: dict[int, _Backing] = {}
        self._by_handle: dict[int, _Backing] = {}

    def check(self, agreed: bool) -> None:
        """Whether it works here; `agreed`: whether the kernel did. Raises MountFailed with what to do."""
        if not agreed:
            raise MountFailed(
                "--passthrough: this kernel has no FUSE passthrough: Linux 6.9 or newer is needed"
            )
        try:
            file = self._files.check_place()
        except OSError as exc:
            raise MountFailed(
                f"--passthrough: the cache folder's file system can't be used for it ({exc.strerror}): use "
                "a cache folder on a local disk"
            ) from exc
        try:
            device.close_backing(device.open_backing(file))
        except OSError as exc:
            raise MountFailed(f"--passthrough: {_why(exc)}") from exc
        finally:
            os.close(file)

    def open(self, inode: Inode) -> int | None:
        """A handle with which the kernel reads the file itself; None where it must be read through the
        daemon. Nothing may wait between this and the answer."""
        found = self._by_inode.get(inode.number)
        if found is None:
            found = None if inode.cached_opens else self._hold(inode)
            if found is None:
                return None
        found.opens += 1
        return device.passthrough_handle(found.backing)

    def _hold(self, inode: Inode) -> _Backing | None:
        held = self._files.hold(inode.cid)
        if held is None:
            self._files.consider(inode.cid)
            return None
        entry, file = held
        try:
            backing = device.open_backing(file)
        except OSError:
            self._files.let_go(entry)
            return None
        found = self._by_inode[inode.number] = _Backing(inode, entry, backing)
        self._by_handle[device.passthrough_handle(backing)] = found
        return found

    def release(self, handle: int) -> Inode | None:
        """The inode of a handle that `open` gave; None for any other handle."""
        found = self._by_handle.get(handle)
        if found is None:
            return None
        found.opens -= 1
        if not found.opens:
            del self._by_inode[found.inode.number], self._by_handle[handle]
            device.close_backing(found.backing)
            self._files.let_go(found.entry)
        return found.inode


def _why(exc: OSError) -> str:
    if exc.errno == errno.EPERM:
        return "only root (CAP_SYS_ADMIN) may let the kernel read files itself: run it as root, or without"
    if exc.errno == errno.ELOOP:
        return "the cache folder lies on an overlay: use a cache folder on a local disk"
    return f"the kernel can't read the cache folder's files itself: {exc.strerror}"
