"""The sandbox of the guest's process: restrictions that hold even if a guest breaks out of wasmtime.

The layers are no_new_privs, no capabilities, landlock (`ipfsfuse.confinement`) and a static seccomp filter.
Each layer is used if the kernel has it; `lock` says which are active. The guest's process keeps its user,
because a FUSE mount answers EACCES to another user.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

from ipfsfuse import confinement
from ipfsfuse.confinement import Access

LAYERS = ("no_new_privs", "capabilities", "landlock", "seccomp")


def available() -> list[str]:
    """The LAYERS that this kernel and machine have. Changes nothing."""
    has_seccomp = os.uname().machine in _ARCH and os.path.exists("/proc/sys/kernel/seccomp/actions_avail")
    found = (True, True, confinement.landlock_abi() > 0, has_seccomp)
    return [name for name, is_there in zip(LAYERS, found, strict=True) if is_there]


def lock(allowed: Sequence[Access]) -> list[str]:
    """Locks this process, which must have one thread, and all that it starts. Returns the active LAYERS."""
    found = (
        confinement.refuse_new_privileges(),
        confinement.drop_capabilities(),
        confinement.restrict(allowed),
        _seccomp(),
    )
    return [name for name, is_active in zip(LAYERS, found, strict=True) if is_active]


# -- seccomp (linux/seccomp.h, linux/filter.h) -------------------------------------------------------------

_REFUSED = {
    "x86_64": (
        *(41, 57, 58, 101, 310, 311),  # socket, fork, vfork, ptrace, process_vm_readv and _writev
        *(155, 161, 165, 166, 428, 429, 430, 431, 432, 433, 442),  # pivot_root, chroot, mounts
        *(248, 249, 250, 272, 308, 298, 321, 323),  # keys, unshare, setns, perf, bpf, userfaultfd
        *(425, 426, 427),  # io_uring, whose requests no filter sees
        *(129, 200, 424, 434, 438),  # rt_sigqueueinfo, tkill, pidfd_send_signal, _open, _getfd
        *(90, 91, 268, 452, 92, 93, 94, 260),  # chmod and chown, which landlock does not restrict
        *(188, 189, 190, 197, 198, 199),  # xattrs
        *(163, 167, 168, 169, 175, 176, 313, 246, 320, 304, 135),  # administration; open_by_handle_at
    ),
    "aarch64": (
        *(198, 117, 270, 271, 41, 51, 40, 39, 428, 429, 430, 431, 432, 433, 442),
        *(217, 218, 219, 97, 268, 241, 280, 282, 425, 426, 427, 138, 130, 424, 434, 438),
        *(52, 53, 452, 54, 55, 5, 6, 7, 14, 15, 16, 89, 224, 225, 142, 105, 106, 273, 104, 294, 265, 92),
    ),
}
_CLONE = {"x86_64": 56, "aarch64": 220}
_TO_SELF = {"x86_64": (62, 234, 297), "aarch64": (129, 131, 240)}
"""kill, tgkill, rt_tgsigqueueinfo: allowed to this process only."""
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
    """A BPF program for the process `pid`; None for a machine whose system call numbers are not in our
    tables."""
    if machine not in _ARCH:
        return None
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_JEQ, 1, 0, _ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_JGE, 0, 1, _X32),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_JEQ, 0, 1, _CLONE3),  # a filter can't read its flags; after ENOSYS the C library uses clone
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


def _seccomp() -> bool:
    made = seccomp_filter(os.uname().machine, os.getpid())
    if made is None:
        return False
    held = ctypes.create_string_buffer(made, len(made))
    program = _Program(len(made) // 8, ctypes.cast(held, ctypes.c_void_p))
    libc = ctypes.CDLL(None)
    return bool(libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) == 0)
