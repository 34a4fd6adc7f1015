"""Writes and reads past the page cache, where that is possible and where it pays."""

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ipfsfuse.fileio import files
from ipfsfuse.fileio.buffers import lend
from ipfsfuse.fileio.files import Closing, Direct
from ipfsfuse.sources.local.car_writer import SequentialWriter

SIZE = 64 << 10


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(opened, 8 * SIZE)
    yield opened
    os.close(opened)


def part(fill: bytes) -> memoryview:
    lent = lend(SIZE)
    lent[:] = fill * SIZE
    return lent


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def in_page_cache(file: int, offset: int) -> bool:
    """Whether the bytes are in the page cache, by mincore(2). A read that must not wait (RWF_NOWAIT) would
    start read-ahead, and so change the answer for the next pages."""
    pages = (ctypes.c_ubyte * (SIZE // mmap.PAGESIZE))()
    with mmap.mmap(file, SIZE, mmap.MAP_PRIVATE, offset=offset) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        assert _libc.mincore(ctypes.addressof(first), SIZE, pages) == 0
        del first
    return all(page & 1 for page in pages)


def takes_direct(file: int) -> bool:
    Direct().write(file, [part(b"?")], 0)
    return not in_page_cache(file, 0)


def test_leaves_are_written_past_the_page_cache_and_anything_else_through_it(file: int) -> None:
    if not takes_direct(file):
        pytest.skip("this file system keeps everything in memory")
    writer = Direct()
    writer.write(file, [part(b"a"), part(b"b")], 0)
    writer.write(file, [part(b"c"), part(b"d")[:5000]], 2 * SIZE)
    writer.write(file, [part(b"e")], 4 * SIZE + 512)
    writer.write(file, [b"f" * SIZE], 6 * SIZE)
    assert [in_page_cache(file, at * SIZE) for at in (0, 1, 2, 6)] == [False, False, True, True]
    expected = b"a" * SIZE + b"b" * SIZE + b"c" * SIZE + b"d" * 5000
    assert os.pread(file, len(expected), 0) == expected
    assert os.pread(file, SIZE, 4 * SIZE + 512) == b"e" * SIZE
    assert os.pread(file, SIZE, 6 * SIZE) == b"f" * SIZE
    assert not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT


@pytest.mark.parametrize(
    "unfit",
    [
        part(b"b")[1:4097],
        part(b"b")[:4095],
        part(b"b")[:0],
        memoryview(b"b" * SIZE),
    ],
    ids=["begins within a page", "ends within a page", "empty", "read only"],
)
def test_a_buffer_that_can_not_be_written_past_the_page_cache_is_written_through_it(
    file: int, unfit: memoryview
) -> None:
    if not takes_direct(file):
        pytest.skip("this file system keeps everything in memory")
    writer = Direct()
    writer.write(file, [part(b"a"), unfit], SIZE)
    writer.write(file, [part(b"c")], 4 * SIZE)
    assert os.pread(file, SIZE + len(unfit), SIZE) == b"a" * SIZE + bytes(unfit)
    assert [in_page_cache(file, at * SIZE) for at in (1, 4)] == [True, False]


def test_a_slow_disk_is_written_through_the_page_cache_and_past_it_again_later(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not takes_direct(file):
        pytest.skip("this file system keeps everything in memory")
    writer, seconds = Direct(), iter(range(1000))
    monkeypatch.setattr(files.time, "monotonic", lambda: next(seconds))  # each write takes a second
    writer.write(file, [part(b"a")], 0)
    for _ in range(files.BUFFERED_WRITES):
        writer.write(file, [part(b"b")], SIZE)
    assert [in_page_cache(file, at * SIZE) for at in (0, 1)] == [False, True]
    writer.write(file, [part(b"c")], 2 * SIZE)
    assert not in_page_cache(file, 2 * SIZE)
    assert os.pread(file, 3 * SIZE, 0) == b"a" * SIZE + b"b" * SIZE + b"c" * SIZE


def test_a_slow_disk_is_read_past_the_page_cache(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not takes_direct(file):
        pytest.skip("this file system keeps everything in memory")
    reader, seconds = Direct(), iter(range(1000))
    monkeypatch.setattr(files.time, "monotonic", lambda: next(seconds))  # each call takes a second
    reader.write(file, [part(b"a"), part(b"b")], 0)
    for at in (0, SIZE):
        reader.read(file, [part(b"?")], at)
    assert [in_page_cache(file, at) for at in (0, SIZE)] == [False, False]


def test_leaves_are_read_past_the_page_cache_to_the_end_of_the_file(file: int) -> None:
    if not takes_direct(file):
        pytest.skip("this file system keeps everything in memory")
    os.pwrite(file, b"a" * SIZE + b"b" * 5000, 0)
    os.ftruncate(file, SIZE + 5000)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    into = [part(b"?"), part(b"?")]
    Direct().read(file, into, 0)
    assert into[0] == b"a" * SIZE
    assert into[1][:5000] == b"b" * 5000
    assert not in_page_cache(file, 0)


@pytest.mark.parametrize("refuses", ["flag", "write"])
def test_a_file_system_that_refuses_direct_writes_is_asked_only_once(
    file: int, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    """No file system here refuses them, so the refusal is a fake."""
    asked = 0
    real = fcntl.fcntl, os.pwritev

    def set_flags(number: int, command: int, flags: int = 0) -> int:
        nonlocal asked
        if flags & os.O_DIRECT:
            asked += 1
            if refuses == "flag":
                raise OSError(errno.EINVAL, "no")
        return real[0](number, command, flags)

    def write(number: int, parts: list[memoryview], offset: int) -> int:
        if real[0](number, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real[1](number, parts, offset)

    monkeypatch.setattr(files.fcntl, "fcntl", set_flags)
    monkeypatch.setattr(os, "pwritev", write)
    writer = Direct()
    for at, fill in enumerate((b"a", b"b")):
        writer.write(file, [part(fill)], at * SIZE)
    assert os.pread(file, 2 * SIZE, 0) == b"a" * SIZE + b"b" * SIZE
    assert asked == 1


def test_a_full_disk_raises_an_error(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="full"):
        Direct().write(file, [part(b"a")], 0)


BUFFER = SequentialWriter.BUFFER


@pytest.mark.parametrize("threads", [True, False], ids=["in a thread", "without threads"])
def test_a_file_is_written_in_sequence_by_parts_of_any_size(
    file: int, monkeypatch: pytest.MonkeyPatch, threads: bool
) -> None:
    if not threads:

        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
    parts = [os.urandom(size) for size in (1, 5000, BUFFER - 5001, 7, 2 * BUFFER, 3 * BUFFER + 11, 0, 13)]
    os.ftruncate(file, 0)
    with closing(SequentialWriter(file)) as writer:
        writer.write(parts[0])
        writer.writelines(parts[1:])
        writer.finish(b"the start")
    expected = b"the start" + b"".join(parts)[9:]
    assert os.fstat(file).st_size == len(expected)
    assert os.pread(file, len(expected), 0) == expected


def test_a_write_in_sequence_that_fails_is_reported_by_the_next_one_or_at_the_end() -> None:
    with Closing(os.open("/dev/full", os.O_WRONLY)) as full:
        with closing(SequentialWriter(full)) as writer:
            writer.write(bytes(BUFFER))
            with pytest.raises(OSError, match="No space left"):
                writer.write(bytes(BUFFER))
        with closing(SequentialWriter(full)) as writer:
            writer.write(bytes(BUFFER))
            with pytest.raises(OSError, match="No space left"):
                writer.finish()


def test_a_writer_that_is_closed_early_writes_no_more(file: int) -> None:
    os.ftruncate(file, 0)
    writer = SequentialWriter(file)
    writer.write(bytes(BUFFER + 1))
    writer.close()
    assert os.fstat(file).st_size == BUFFER
