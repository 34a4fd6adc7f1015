"""The locked room around the guest's process: what the kernel refuses even to a guest that breaks out of
wasmtime.

no_new_privs, no capabilities, landlock and a static seccomp filter, by ctypes: the packages for them take
50 ms to import. Each layer is used where the kernel has it; `lock` says which are active. The guest's process
keeps its user, because a FUSE mount answers EACCES to another.
"""

import ctypes
import errno
import os
import platform
import stat
import struct
from collections.abc import Sequence
from typing import NamedTuple

LAYERS = ("no_new_privs", "capabilities", "landlock", "seccomp")


class Access(NamedTuple):
    """What landlock allows below the open file or folder `file`."""

    file: int
    write: bool = False
    execute: bool = False


def available() -> list[str]:
    """The LAYERS that this kernel and machine have. Changes nothing."""
    layers = list(LAYERS[:2])
    if landlock_abi() > 0:
        layers.append(LAYERS[2])
    if platform.machine() in _ARCH and os.path.exists("/proc/sys/kernel/seccomp/actions_avail"):
        layers.append(LAYERS[3])
    return layers


def lock(allowed: Sequence[Access]) -> list[str]:
    """Locks this process, which has one thread, and all that it starts. Gives the LAYERS that are active."""
    libc = ctypes.CDLL(None, use_errno=True)
    active = []
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        active.append(LAYERS[0])
    if _drop_capabilities(libc):
        active.append(LAYERS[1])
    if _landlock(libc, allowed):
        active.append(LAYERS[2])
    if _seccomp(libc):
        active.append(LAYERS[3])
    return active


_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 24, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522


def _drop_capabilities(libc: ctypes.CDLL) -> bool:
    """The bounding set first: it is what a file's capabilities, or being root, give back at an exec."""
    for number in range(64):
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITY_VERSION_3, 0))
    return bool(libc.capset(header, ctypes.create_string_buffer(24)) == 0)


# -- landlock (linux/landlock.h) ---------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_ALL_FS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_ON_FILES = _EXECUTE | _READ_FILE | 1 << 1 | 1 << 14 | 1 << 15
_TCP, _SCOPES = 3, 3
"""Binding and connecting; abstract sockets and signals."""


def landlock_abi() -> int:
    """0 if the kernel has no landlock."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_CREATE_RULESET, None, 0, 1)))


def _landlock(libc: ctypes.CDLL, allowed: Sequence[Access]) -> bool:
    abi = landlock_abi()
    if abi == 0:
        return False
    handled = _ALL_FS[min(abi, 5)]
    words = [handled, *[_TCP] * (abi >= 4), *[_SCOPES] * (abi >= 6)]
    attributes = struct.pack(f"{len(words)}Q", *words)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    try:
        for each in allowed:
            rights = handled & ~_EXECUTE if each.write else _READ_FILE | _READ_DIR
            if each.execute:
                rights |= _EXECUTE
            if not _is_folder(each.file):
                rights &= _ON_FILES
            rule = struct.pack("=Qi", rights & handled, each.file)
            if libc.syscall(_ADD_RULE, ruleset, 1, rule, 0) != 0:
                return False
        return bool(libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(ruleset)


def _is_folder(file: int) -> bool:
    return stat.S_ISDIR(os.fstat(file).st_mode)


# -- seccomp (linux/seccomp.h, linux/filter.h) -------------------------------------------------------------

_REFUSED = {
    "x86_64": (
        *(41, 57, 58, 101, 310, 311),  # socket, fork, vfork, ptrace, process_vm_readv and _writev
        *(155, 161, 165, 166, 428, 429, 430, 431, 432, 433, 442),  # pivot_root, chroot, mounts
        *(248, 249, 250, 272, 308, 298, 321, 323),  # keys, unshare, setns, perf, bpf, userfaultfd
        *(425, 426, 427),  # io_uring, which no filter sees into
        *(129, 200, 424, 434, 438),  # rt_sigqueueinfo, tkill, pidfd_send_signal, _open, _getfd
        *(90, 91, 268, 452, 92, 93, 94, 260),  # chmod and chown: landlock leaves them open
        *(188, 189, 190, 197, 198, 199),  # xattrs
        *(163, 167, 168, 169, 175, 176, 313, 246, 320, 304, 135),  # the machine's own; open_by_handle_at
    ),
    "aarch64": (
        *(198, 117, 270, 271, 41, 51, 40, 39, 428, 429, 430, 431, 432, 433, 442),
        *(217, 218, 219, 97, 268, 241, 280, 282, 425, 426, 427, 138, 130, 424, 434, 438),
        *(52, 53, 452, 54, 55, 5, 6, 7, 14, 15, 16, 89, 224, 225, 142, 105, 106, 273, 104, 294, 265, 92),
    ),
}
_CLONE = {"x86_64": 56, "aarch64": 220}
_TO_SELF = {"x86_64": (62, 234, 297), "aarch64": (129, 131, 240)}
"""kill, tgkill, rt_tgsigqueueinfo: to this process alone."""
_PRLIMIT64 = {"x86_64": 302, "aarch64": 261}
_CLONE3 = 435
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_CLONE_THREAD = 0x00010000
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def seccomp_filter(machine: str, pid: int) -> bytes | None:
    """A BPF program for the process `pid`; None for a machine whose numbers are not known here."""
    if machine not in _ARCH:
        return None
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_JEQ, 1, 0, _ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_JGE, 0, 1, _X32),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_JEQ, 0, 1, _CLONE3),  # its flags are behind a pointer: the C library then uses clone
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_JEQ, 0, 4, _CLONE[machine]),
        (_LOAD, 0, 0, 16),
        (_JSET, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    for number in _TO_SELF[machine]:
        code += [(_JEQ, 0, 4, number), (_LOAD, 0, 0, 16), (_JEQ, 0, 1, pid), (_RETURN, 0, 0, _ALLOW)]
        code += [(_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    code += [(_JEQ, 0, 5, _PRLIMIT64[machine]), (_LOAD, 0, 0, 16), (_JEQ, 1, 0, 0), (_JEQ, 0, 1, pid)]
    code += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    for number in _REFUSED[machine]:
        code += [(_JEQ, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *each) for each in code)


def _seccomp(libc: ctypes.CDLL) -> bool:
    made = seccomp_filter(platform.machine(), os.getpid())
    if made is None:
        return False
    held = ctypes.create_string_buffer(made, len(made))
    program = _Program(len(made) // 8, ctypes.cast(held, ctypes.c_void_p))
    return bool(libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) == 0)
