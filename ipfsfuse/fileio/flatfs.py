"""Reads the blocks of a flatfs folder. One call in C reads and hashes a block. Others are read ahead
(`flatfs.c`).

Concurrency: any thread. `read` blocks. `take` blocks for at most `patience` seconds.
"""

import atexit
import ctypes
import os
import weakref
from collections.abc import Sequence
from typing import NamedTuple

from ipfsfuse.fileio.buffers import lend
from ipfsfuse.fileio.files import load_library
from ipfsfuse.structures import Buffer

MISSING = -1
LENT = 256 << 10
"""Bytes of the smallest block that comes in a lent buffer: new memory for 1 MiB takes up to 0.5 ms."""
MAX_CHARACTERS = 54
"""One less than the characters of a block's name."""

_LIBRARY = load_library("ipfsfuse.fileio._native")


class _Found(ctypes.Structure):
    """`struct found` of flatfs.c."""

    _fields_ = (
        ("size", ctypes.c_int64),
        ("bytes", ctypes.c_void_p),
        ("is_hashed", ctypes.c_int),
        ("digest", ctypes.c_ubyte * 32),
    )


_LIBRARY.repo_open.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p)
_LIBRARY.repo_open.restype = ctypes.c_void_p
_LIBRARY.repo_stop.argtypes = _LIBRARY.repo_close.argtypes = (ctypes.c_void_p,)
_LIBRARY.repo_block.argtypes = (ctypes.c_void_p, ctypes.c_int)
_LIBRARY.repo_free.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
_LIBRARY.repo_free_many.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
_LIBRARY.repo_take.argtypes = (
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_void_p,
)
_LIBRARY.repo_read.argtypes = (
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_void_p,
)
_LIBRARY.repo_read_many.argtypes = (
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_void_p,
)
for _name in ("stop", "close", "block", "free", "free_many", "read"):
    getattr(_LIBRARY, f"repo_{_name}").restype = None


def _sha256() -> ctypes.Array[ctypes.c_void_p]:
    """The functions of `struct sha256`, from the OpenSSL of `hashlib`; all NULL if Python has no OpenSSL."""
    names = ("MD_CTX_new", "DigestInit_ex", "DigestUpdate", "DigestFinal_ex", "MD_CTX_free", "sha256")
    functions = ctypes.c_void_p * len(names)
    try:
        import _hashlib

        openssl = ctypes.CDLL(_hashlib.__file__)
        found = [ctypes.cast(getattr(openssl, f"EVP_{name}"), ctypes.c_void_p) for name in names]
    except (ImportError, OSError, AttributeError):
        return functions()
    return functions(*found)


_SHA256 = _sha256()


_open: set[int] = set()
"""The repositories that `_close` may free."""
os.register_at_fork(after_in_child=_open.clear)  # a child has no such threads, and may have their locks


def _close(repo: int) -> None:
    if repo in _open:
        _open.remove(repo)
        _LIBRARY.repo_close(repo)


@atexit.register
def _stop_all() -> None:
    """Stops the threads and frees nothing: a worker thread that was not awaited may still read."""
    while _open:
        _LIBRARY.repo_stop(_open.pop())


class Read(NamedTuple):
    """An unverified block, and its SHA-256 if it was hashed meanwhile."""

    block: Buffer
    digest: bytes | None


class BlockFiles:
    """Finds blocks by the digest of their SHA-256 multihash. The codec is needed to read ahead."""

    def __init__(self, folder: str, characters: int) -> None:
        """`characters` is the length of the names of the folders in `folder`."""
        most = min(characters, MAX_CHARACTERS)
        self._repo = _LIBRARY.repo_open(os.fsencode(folder), most, _SHA256)
        if not self._repo:
            raise MemoryError
        _open.add(self._repo)
        weakref.finalize(self, _close, self._repo).atexit = False

    @property
    def name_listener(self) -> tuple[int, int]:
        """A function in C and its first argument. Its other arguments are a name that is looked up, and the
        size of the name. If the name is a CID, it reads that block ahead. This object must outlive its
        use."""
        return ctypes.cast(_LIBRARY.repo_name, ctypes.c_void_p).value or 0, self._repo

    def take(self, digest: bytes, codec: int, patience: float) -> Read | int | None:
        """The block (like `read`) if it was read ahead, or if the thread that reads ahead can read it within
        `patience` seconds; else None. With a negative `patience` always None: then the block is read ahead
        for a later `read`, unless other blocks are being read."""
        found = _Found()
        taken = _LIBRARY.repo_take(self._repo, digest, codec, int(patience * 1e9), ctypes.byref(found))
        return self._taken(found) if taken else None

    def block_names(self, blocked: bool) -> None:
        """If `blocked`, `name_listener` reads nothing from now on."""
        _LIBRARY.repo_block(self._repo, blocked)

    def read(self, digest: bytes, codec: int) -> Read | int:
        """The block, at once if it was read ahead. MISSING if there is no such file or it can't be read. The
        negative size of a block of over 2 MiB."""
        found = _Found()
        _LIBRARY.repo_read(self._repo, digest, codec, ctypes.byref(found))
        return self._taken(found)

    def read_many(self, digests: Sequence[bytes], most: int) -> list[Read | int]:
        """Reads several blocks (like `read`) by one call with some threads: the first one, and the next ones
        as long as they have at most `most` bytes together."""
        found = (_Found * len(digests))()
        first = ctypes.addressof(found)
        seen = _LIBRARY.repo_read_many(self._repo, b"".join(digests), len(digests), most, first)
        try:
            return [_copied(each) for each in found[:seen]]
        finally:
            _LIBRARY.repo_free_many(self._repo, first, len(digests))

    def _taken(self, found: _Found) -> Read | int:
        try:
            return _copied(found)
        finally:
            _LIBRARY.repo_free(self._repo, found.bytes)


def _copied(found: _Found) -> Read | int:
    if found.size < 0:
        return int(found.size)
    digest = bytes(found.digest) if found.is_hashed else None
    if found.size < LENT:
        return Read(ctypes.string_at(found.bytes, found.size), digest)
    block = lend(found.size)
    ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(block)), found.bytes, found.size)
    return Read(block, digest)
