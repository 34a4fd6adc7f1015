"""The INIT exchange's bytes (linux/fuse.h, protocol 7.31 and up): what libfuse does not ask for is asked for
here.

Pure: bytes in, bytes out.
"""

import struct
from typing import NamedTuple

from ipfsfuse.errors import MountFailed

FUSE_INIT = 26

PARALLEL_DIROPS = 1 << 18
CACHE_SYMLINKS = 1 << 23

MAX_BACKGROUND = 4096
CONGESTION = 3072
"""Requests the kernel may have waiting at once; with libfuse's 12, that many stalled reads would stop the
mount."""
MAX_WRITE = 1 << 20
"""Bytes that a write may have, of which none ever gets here: who reads the device must have room for one."""

_IN_HEADER = struct.Struct("<IIQ")  # length, opcode, unique
_INIT_IN = struct.Struct("<IIII")  # major, minor, max_readahead, flags
_INIT_IN_AT = 40
_OUT_HEADER = struct.Struct("<IiQ")  # length, error, unique
_READAHEAD_AT = 24
_FLAGS_AT = 28
_BACKGROUND_AT = 32
_MAX_WRITE_AT = 36


class Init(NamedTuple):
    """What the kernel offers."""

    major: int
    minor: int
    flags: int


def read_init(request: bytes) -> Init:
    """The kernel's INIT request. Raises MountFailed if it is none."""
    if len(request) < _INIT_IN_AT + _INIT_IN.size or _IN_HEADER.unpack_from(request)[1] != FUSE_INIT:
        raise MountFailed("the kernel did not begin with INIT")
    major, minor, _readahead, flags = _INIT_IN.unpack_from(request, _INIT_IN_AT)
    return Init(major, minor, flags)


def extend_reply(reply: bytes, offered: int, readahead: bool) -> bytes:
    """libfuse's INIT reply with our flags, as far as the kernel offered them, and room for thousands of
    requests; without `readahead` the kernel asks only for what was read.

    Raises MountFailed if libfuse answered with an error or in a form that is not known."""
    if len(reply) < _MAX_WRITE_AT + 4:
        raise MountFailed(f"libfuse answered INIT in {len(reply)} bytes")
    error = _OUT_HEADER.unpack_from(reply)[1]
    if error:
        raise MountFailed(f"libfuse refused INIT with error {-error}")
    out = bytearray(reply)
    flags = struct.unpack_from("<I", out, _FLAGS_AT)[0]
    struct.pack_into("<I", out, _FLAGS_AT, flags | offered & (PARALLEL_DIROPS | CACHE_SYMLINKS))
    if not readahead:
        struct.pack_into("<I", out, _READAHEAD_AT, 0)
    struct.pack_into("<HH", out, _BACKGROUND_AT, MAX_BACKGROUND, CONGESTION)
    struct.pack_into(
        "<I", out, _MAX_WRITE_AT, min(struct.unpack_from("<I", out, _MAX_WRITE_AT)[0], MAX_WRITE)
    )
    return bytes(out)
