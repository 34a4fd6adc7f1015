"""Gives up rights of this process for good: new privileges, capabilities, and, with landlock, access to
files. Also hides its memory.

It uses ctypes, since packages for this take 50 ms to import. The daemon of a mount and the process of a guest
(`ipfsfuse_run.lockdown`) use it. The calls apply to the calling thread and to the threads and processes that
it starts later. So make them before there are other threads.
"""

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Sequence
from typing import NamedTuple


class Access(NamedTuple):
    """What landlock allows for the open file or folder `file`, and below it."""

    file: int
    write: bool = False
    execute: bool = False
    remove_folders: bool = False
    """Whether empty folders may be removed without `write`."""


_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38


def hide_memory() -> None:
    """From now on, no other process of this user can trace this one, read its memory or open its files in
    /proc, and no core is dumped. A guest that has escaped would be such a process. The same holds for a
    forked process until it executes another program (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def refuse_new_privileges() -> bool:
    """From now on, no setuid program gives this thread more rights (no_new_privs, prctl(2)). Returns whether
    that is so."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)


CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN = 1, 2, 21
"""Root's rights to write and to read any file whatever its mode, and to do many other things
(capabilities(7))."""
_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522


def drop_capabilities(kept: Sequence[int] = ()) -> bool:
    """From now on, this thread has only those of its capabilities that are in `kept`. Returns whether that is
    so."""
    libc = ctypes.CDLL(None, use_errno=True)
    for number in range(64):  # else an exec gives them back to root, or by a file's capabilities
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITY_VERSION_3, 0))
    held = ctypes.create_string_buffer(24)  # effective, permitted, inheritable; then the numbers from 32 up
    if libc.capget(header, held) != 0:
        return False
    wanted = sum(1 << number for number in kept)
    _effective, low, _inheritable, _effective, high, _inheritable = struct.unpack("6I", held.raw)
    low, high = low & wanted, high & wanted >> 32
    left = ctypes.create_string_buffer(struct.pack("6I", low, low, 0, high, high, 0))
    return bool(libc.capset(header, left) == 0)


# -- landlock (linux/landlock.h) ---------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _READ_FILE, _READ_DIR, _REMOVE_DIR = 1 << 0, 1 << 2, 1 << 3, 1 << 4
_ALL_FS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_ON_FILES = _EXECUTE | _READ_FILE | 1 << 1 | 1 << 14 | 1 << 15
BIND_TCP, CONNECT_TCP = 1, 2
ABSTRACT_SOCKETS, SIGNALS = 1, 2


def landlock_abi() -> int:
    """The version of landlock; 0 if the kernel has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_CREATE_RULESET, None, 0, 1)))


def restrict(
    allowed: Sequence[Access], tcp: int = BIND_TCP | CONNECT_TCP, scopes: int = ABSTRACT_SOCKETS | SIGNALS
) -> bool:
    """Denies this thread all files that are not `allowed`, and mounting. If the kernel can, also denies `tcp`
    and `scopes`: abstract sockets and signals to processes that this thread did not start. Returns whether
    that is so; False if the kernel has no landlock. Needs no_new_privs or root."""
    libc = ctypes.CDLL(None, use_errno=True)
    abi = landlock_abi()
    if abi == 0:
        return False
    handled = _ALL_FS[min(abi, 5)]
    words = [handled, *[tcp] * (abi >= 4), *[scopes] * (abi >= 6)]
    attributes = struct.pack(f"{len(words)}Q", *words)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    try:
        for each in allowed:
            rights = handled & ~_EXECUTE if each.write else _READ_FILE | _READ_DIR
            if each.execute:
                rights |= _EXECUTE
            if each.remove_folders:
                rights |= _REMOVE_DIR
            if not stat.S_ISDIR(os.fstat(each.file).st_mode):
                rights &= _ON_FILES
            rule = struct.pack("=Qi", rights & handled, each.file)
            # EBADFD: a file without a path (memfd_create(2)), which landlock never denies
            if libc.syscall(_ADD_RULE, ruleset, 1, rule, 0) != 0 and ctypes.get_errno() != errno.EBADFD:
                return False
        return bool(libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(ruleset)
