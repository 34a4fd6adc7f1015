"""Compiled guests. The key of an entry is made of the module's bytes, wasmtime's version and settings.

wasmtime runs compiled code without checking it. So the code comes only from a folder of the user's own cache
with mode 0700. It is loaded through the descriptor of the file that was checked, in a process that the kernel
has locked in. A module may break the compiler, so it is compiled in a process that can reach nothing. That
process returns the code in a file without a name, and this process stores it under the module's own key. So a
module can spoil its own code only.

Any number of processes may use the folder at once. While an entry `KEY` is compiled, the file `KEY.part` is
locked: one process compiles, the others wait. A rename makes the complete entry appear. Files with other
names are left alone.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import resource
import signal
import stat
import struct
import time
from collections.abc import Callable, Sequence
from io import BufferedIOBase
from typing import NamedTuple

from ipfsfuse import units
from ipfsfuse.errors import StoreFailed
from ipfsfuse_run import host_folders, lockdown, processes
from ipfsfuse_run.errors import GuestRefused

BOUND = 1 << 30
"""Bytes that the whole cache may take. Entries that were used longest ago are removed first."""

_PART = ".part"
_ENTRY = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}(\.part)?|\.[0-9a-f]{16}\.part")
"""Names of our own files: entries, entries that are being compiled, and the latter as an earlier version
named them."""
_MAX_ANSWER = 64 << 10

Key = Callable[[str, str], str]
"""The name of the entry for a guest's SHA-256 and kind."""
Build = Callable[[], bytes]
"""Compiles a guest in the compiling process, after it has locked that process in. Raises GuestRefused."""

MODULE, COMPONENT = "module", "component"
_MAGIC = b"\0asm"
_KINDS = {b"\x01\0\0\0": MODULE, b"\x0d\0\x01\0": COMPONENT}


class Code(NamedTuple):
    """A compiled guest that is not loaded yet. `file` is a descriptor; `name` is for messages."""

    name: str
    kind: str
    file: int


class CodeCache:
    """With `folder` None the cache stores nothing: a run must not fail because there is no cache folder."""

    def __init__(self, folder: str | os.PathLike[str] | None, bound: int = BOUND) -> None:
        self.folder = None if folder is None else os.fspath(folder)
        self.bound = bound

    @classmethod
    def of_user(cls) -> "CodeCache":
        try:
            return cls(host_folders.private_folder("code"))
        except StoreFailed:
            return cls(None)

    def open_entry(self, key: str) -> int | None:
        """A descriptor of the entry `key`; None if there is none that is ours and complete."""
        if self.folder is None:
            return None
        try:
            file = os.open(
                os.path.join(self.folder, key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
        except OSError:
            return None
        try:
            if _is_ours(os.fstat(file)) and _is_whole(file):
                _used_now(file)
                return file
        except OSError:
            pass
        os.close(file)
        return None

    def kept(self, file: BufferedIOBase, name: str, key: Key) -> Code | None:
        """The guest in `file` if it was compiled before. Does not keep its bytes in memory: that would take
        10 ms for 25 MB. Leaves the file at its start; a pipe is not read. Raises OSError."""
        if not file.seekable():
            return None
        kind = _kind(file.read(8))
        file.seek(0)
        if kind is None:
            return None
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        found = self.open_entry(key(digest, kind))
        return None if found is None else Code(name, kind, found)

    def compiled(self, kind: str, code: bytes, name: str, memory: int, key: Key, build: Build) -> Code:
        """The compiled guest `code`, from the cache or from a process that may write to `memory` bytes. Code
        that can't be stored is in memory only, so that a full disk costs speed and nothing else. Forks.
        Raises GuestRefused."""
        entry = key(hashlib.sha256(code).hexdigest(), kind)
        return Code(name, kind, self._compiled(entry, build, name, memory))

    def _compiled(self, key: str, build: Build, name: str, memory: int) -> int:
        found = self.open_entry(key)
        if found is not None:
            return found
        path = None if self.folder is None else os.path.join(self.folder, f"{key}{_PART}")
        part = None if path is None else self._locked(path)
        if path is None or part is None:
            return in_own_process(build, name, memory)
        is_kept = False
        try:
            found = self.open_entry(key)  # another process may have made it meanwhile
            if found is not None:
                return found
            code = in_own_process(build, name, memory)
            is_kept = self._put(part, path, key, code)
        finally:
            if not is_kept:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            os.close(part)
        kept = self.open_entry(key) if is_kept else None
        if kept is None:
            return code
        os.close(code)
        return kept

    def _locked(self, part: str) -> int | None:
        """The file `part`, created if it is missing, and locked by us alone. None if it can't be ours."""
        with contextlib.suppress(OSError):
            while True:
                file = os.open(
                    part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600
                )
                if not _is_ours(os.fstat(file)):
                    os.close(file)
                    return None
                fcntl.flock(file, fcntl.LOCK_EX)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file), os.lstat(part)):
                        return file
                os.close(file)  # it became an entry, or was removed, while we waited
        return None

    def _put(self, out: int, part: str, key: str, code: int) -> bool:
        """Copies the file `code` to the locked file `out`, which becomes the entry."""
        try:
            os.ftruncate(out, 0)
            size, at = os.fstat(code).st_size, 0
            while at < size:
                at += os.sendfile(out, code, at, size - at)
            _used_now(out)
            os.fdatasync(out)  # a file cut short by a power failure would be run
            os.rename(part, part.removesuffix(_PART))
        except OSError:
            return False
        with contextlib.suppress(OSError):
            self._trim(os.path.dirname(part), key)
        return True

    def _trim(self, folder: str, made: str) -> None:
        with os.scandir(folder) as entries:
            own = [
                each
                for each in entries
                if _ENTRY.fullmatch(each.name) and each.is_file(follow_symlinks=False)
            ]
        found = sorted(
            ((each.stat(follow_symlinks=False), each.path) for each in own),
            key=lambda pair: pair[0].st_mtime_ns,
        )
        total = sum(info.st_size for info, _path in found)
        for info, path in found:
            if total <= self.bound:
                return
            if path != os.path.join(folder, made) and (not path.endswith(_PART) or _is_unlocked(path)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= info.st_size


def _is_ours(found: os.stat_result) -> bool:
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_uid == os.geteuid()
        and not found.st_mode & 0o022
        and found.st_nlink == 1
    )


def _is_unlocked(path: str) -> bool:
    """Whether no process is compiling into the file `path`."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(file)


def _used_now(file: int) -> None:
    """Sets the time of last use. The kernel's own time stamps advance only every few milliseconds, and two
    guests can be started within that time."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


_ELF64 = struct.Struct("<4s36xQ10xHH2x")
"""The fields of an ELF header that we need: the magic number; where the table of sections is; the size and
the number of its entries."""


def _is_whole(file: int) -> bool:
    """wasmtime writes an ELF file, and the table of sections comes last in it. A file that was cut short
    lacks some of it."""
    head = os.pread(file, _ELF64.size, 0)
    if len(head) < _ELF64.size:
        return False
    magic, table, size, count = _ELF64.unpack(head)
    return bool(magic == b"\x7fELF" and table + size * count <= os.fstat(file).st_size)


def entry_key(digest: str, wasmtime: os.stat_result, settings: Sequence[str]) -> str:
    """The name of an entry. Size and time of `wasmtime` (the library or the command) stand for its version:
    asking for the version takes 20 ms. wasmtime also checks the version itself. The processor is part of the
    name, because wasmtime uses all its features, and another machine that shares the home folder may lack
    some."""
    parts = (str(wasmtime.st_size), str(wasmtime.st_mtime_ns), os.uname().machine, _processor(), *settings)
    return f"{digest}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def _processor() -> str:
    """The features of this processor, as the kernel names them."""
    try:
        file = os.open("/proc/cpuinfo", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(file, 8192)  # the first processor is enough, and a large machine has many
        finally:
            os.close(file)
    except OSError:
        return ""
    found = re.search(rb"^(?:flags|Features)\s*:.*$", text, re.MULTILINE)
    return "" if found is None else found[0].decode(errors="replace")


def _kind(head: bytes) -> str | None:
    """The kind of WebAssembly that begins with these 8 bytes; None for text and for unknown versions."""
    return _KINDS.get(head[4:]) if head.startswith(_MAGIC) else None


def binary(code: bytes, name: str, memory: int) -> tuple[str, bytes]:
    """The guest's kind and its binary form. Text is translated in a process of its own that may write to
    `memory` bytes, because 1 byte of text can take a hundred bytes of memory. Raises GuestRefused."""
    if code.startswith(_MAGIC):
        kind = _kind(code[:8])
        if kind is None:
            raise GuestRefused(f"{name} is WebAssembly of a version that can't run, or cut short")
        return kind, code
    if not code.lstrip().startswith((b"(", b";;")):
        raise GuestRefused(f"{name} is not WebAssembly: it begins with neither \\0asm nor text")
    import wasmtime  # here, because the locked process can't import

    def translate() -> bytes:
        lockdown.lock([])
        try:
            return bytes(wasmtime.wat2wasm(code))
        except wasmtime.WasmtimeError as exc:
            text = " ".join(str(exc).split())
            raise GuestRefused(f"{name} is not WebAssembly text: {text}") from exc

    with open(in_own_process(translate, name, memory), "rb") as made:
        made.seek(0)
        return binary(made.read(), name, memory)


# -- the compiling process ---------------------------------------------------------------------------------


def in_own_process(build: Build, name: str, memory: int) -> int:
    """Runs `build` in a forked process that may write to `memory` bytes and has only its answer's files open.
    Returns a file without a name that holds the code. The forked process ends with this one, so killing this
    one ends the compilation. Raises GuestRefused as `build` does, and if the process fails."""
    code = os.memfd_create("code", os.MFD_CLOEXEC)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    pid = processes.fork(lambda: _compile(build, write_end, code, memory))
    os.close(write_end)
    with open(read_end, "rb") as answers:
        refused = answers.read(_MAX_ANSWER)
    _pid, status = os.waitpid(pid, 0)
    if not status and not refused and os.fstat(code).st_size:
        return code
    os.close(code)
    if refused:
        raise GuestRefused(_text(refused))
    end = os.waitstatus_to_exitcode(status)
    raise GuestRefused(
        f"{name} can't be compiled: {_end_text(end)} (it may use "
        f"{units.size_text(memory)} of memory: give -W compile-memory=SIZE for more)"
    )


def _compile(build: Build, write_end: int, code: int, memory: int) -> None:
    processes.detach(write_end, code)  # Rust writes a back-trace to stderr when memory runs out
    processes.limit(resource.RLIMIT_DATA, memory)
    processes.limit(resource.RLIMIT_FSIZE, memory)
    try:
        with open(code, "wb", closefd=False) as out:
            out.write(build())
    except GuestRefused as exc:
        os.write(write_end, json.dumps(str(exc)[: _MAX_ANSWER // 16]).encode())


def _text(answer: bytes) -> str:
    """A compiler that a module has broken may answer anything."""
    try:
        return str(json.loads(answer))
    except (ValueError, RecursionError):
        return "the compiling process gave no answer that can be understood"


def _end_text(code: int) -> str:
    if code >= 0:
        return "the compiling process failed"
    return f"the compiling process was ended by {signal.Signals(-code).name}"
