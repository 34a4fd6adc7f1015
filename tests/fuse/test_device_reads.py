"""Reads of bytes that wait in memory, and of staged leaves that were verified before: which of them reach
Python, and which bytes the others get."""

import errno
import os
import random
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pyfuse3
import pytest
import trio

from ipfsfuse.cache.store.staging import PIECE
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.fileio.tags import TAG_BYTES, tags_of
from ipfsfuse.fuse import device
from ipfsfuse.fuse.device import ReadWindows
from tests.cache.standin import flip, random_bytes
from tests.fuse.kernel_side import (
    ANSWERED_IN_C,
    PYTHON_BYTES,
    Kernel,
    Operations,
    interrupting,
    kernel,
)
from tests.fuse.test_interrupts import INTERRUPT
from tests.sources.content import raw_blocks

FLIPS = int(os.environ.get("IPFSFUSE_FLIPS", "2000"))
CID, OTHER = raw_blocks(100, 2)
NAME = cids.text(CID).encode()
LEAF = 5 * PIECE + 1000
PASSED_ON = 128
"""Of so many reads in C, the last one goes to Python, so that Python knows that the file is in use."""
HELD = 16 << 20
"""Bytes of tags that C holds. Both constants are as in `pieces.c`."""
SMALL = 1000
"""Bytes of a read. The socket has room for all answers of this size."""
MAX_WAITING, PATIENCE_NS = 256, 50_000_000
"""As `WAITING` and `PATIENCE_NS` in `reads.c`."""


@pytest.mark.parametrize("seed", range(3))
def test_reads_of_added_windows_match_a_model(seed: int) -> None:
    trio.run(_reads_of_added_windows_match_a_model, random.Random(seed))


async def _reads_of_added_windows_match_a_model(dice: random.Random) -> None:
    """Windows of two open files, of any kind of buffer, with and without gaps between them. Reads that the
    windows cover are answered in C. If a window has `notify`, a read that reaches its end goes to Python."""
    added: dict[tuple[int, int], bytes] = {}
    notifies: dict[tuple[int, int], bool] = {}
    windows_of = {handle: ReadWindows(handle, 1, CID) for handle in (3, ANSWERED_IN_C | 4)}

    def covered(handle: int, offset: int, end: int) -> bytes | None:
        content = b""
        while offset < end:
            start = offset // 1_000 * 1_000
            part = added.get((handle, start), b"")[offset - start :]
            if not part or (notifies[handle, start] and offset + len(part) <= end):
                return None
            content += part[: end - offset]
            offset += len(part)
        return content

    async with kernel() as fake_kernel:
        for _ in range(3_000):
            handle, start = dice.choice(list(windows_of)), dice.randrange(8) * 1_000
            windows = windows_of[handle]
            if dice.random() < 0.3:
                if (handle, start) in added and dice.random() < 0.3:
                    windows.remove(start)
                    del added[handle, start]
                else:  # also in place of another window
                    content = dice.randbytes(dice.choice([1, 500, 1_000, 1_000, 1_000]))
                    notify = dice.random() < 0.3
                    windows.add(start, dice.choice([bytes, bytearray, memoryview])(content), notify)
                    added[handle, start], notifies[handle, start] = content, notify
                continue
            offset, size = start + dice.randrange(1_000), dice.choice([1, 100, 500, 1_000, 3_000])
            expected = covered(handle, offset, offset + size)
            got, asked = await fake_kernel.read(handle, offset, size)
            assert asked == (expected is None)
            assert got == (PYTHON_BYTES if asked else expected)
        for handle, start in added:
            windows_of[handle].remove(start)


def test_an_added_buffer_is_held_only_until_it_is_removed() -> None:
    async def main() -> None:
        windows = ReadWindows(5, 1, CID)
        async with kernel() as fake_kernel:
            content = bytearray(b"x" * 100)
            windows.add(0, content, True)
            with pytest.raises(BufferError):
                content.clear()
            assert await fake_kernel.read(5, 0, 50) == (b"x" * 50, False)
            windows.remove(0)
            content.clear()
            assert await fake_kernel.read(5, 0, 50) == (PYTHON_BYTES, True)
            windows.add(0, content := bytearray(100), True)
        content.clear()  # the session has ended, so C has let go of the buffer

    trio.run(main)


def test_windows_for_which_there_is_no_room_are_not_added() -> None:
    async def main() -> None:
        windows = ReadWindows(6, 1, CID)
        async with kernel() as fake_kernel:
            for number in range(600):
                windows.add(number * 10, bytes([number % 256]) * 10, True)
            asked = [(await fake_kernel.read(6, number * 10, 5))[1] for number in range(600)]
            assert asked == [False] * 512 + [True] * 88
            for number in range(600):
                windows.remove(number * 10)

    trio.run(main)


# -- bytes that are expected ---------------------------------------------------------------------------------


async def _expecting(run: Callable[[Kernel, ReadWindows], Awaitable[None]]) -> None:
    windows = ReadWindows(7, 1, CID)
    async with kernel() as fake_kernel:
        with trio.fail_after(30):
            await run(fake_kernel, windows)


async def no_answer(fake_kernel: Kernel) -> None:
    """Waits for longer than a request takes to reach Python, but not as long as a read waits for bytes."""
    with trio.move_on_after(0.01):
        raise AssertionError(await fake_kernel.answer())


def test_a_read_of_expected_bytes_waits_until_all_are_there() -> None:
    async def run(fake_kernel: Kernel, windows: ReadWindows) -> None:
        content = random_bytes(4 * PIECE, 31)
        for round_ in range(20):
            for leaf in range(4):
                windows.expect(leaf * PIECE, PIECE)
            number = fake_kernel.send_read(7, 100, 3 * PIECE)
            for leaf in (3, 1, 0):
                windows.add(leaf * PIECE, content[leaf * PIECE : (leaf + 1) * PIECE], False)
            if round_ == 0:
                await no_answer(fake_kernel)
            windows.add(2 * PIECE, content[2 * PIECE : 3 * PIECE], False)
            assert await fake_kernel.answer() == (number, 0, content[100:][: 3 * PIECE])
            for leaf in range(4):
                windows.remove(leaf * PIECE)

    trio.run(_expecting, run)


def test_expecting_bytes_that_are_there_changes_nothing() -> None:
    async def run(fake_kernel: Kernel, windows: ReadWindows) -> None:
        windows.add(0, b"x" * 100, False)
        windows.expect(0, 100)
        assert await fake_kernel.read(7, 0, 50) == (b"x" * 50, False)

    trio.run(_expecting, run)


def test_added_bytes_take_the_place_of_expected_bytes() -> None:
    """Files whose sources send nothing leave room for the bytes of other files."""

    async def run(fake_kernel: Kernel, windows: ReadWindows) -> None:
        slow = ReadWindows(8, 1, OTHER)
        for number in range(600):
            slow.expect(number * 10, 10)
        sent = [fake_kernel.send_read(8, number * 10, 10) for number in range(100)]
        for number in range(600):
            windows.add(number * 10, b"x" * 10, False)
        assert sorted([(await fake_kernel.answer())[::2] for _ in sent]) == [
            (each, PYTHON_BYTES) for each in sent
        ]
        asked = [(await fake_kernel.read(7, number * 10, 10))[1] for number in range(600)]
        assert asked == [False] * 512 + [True] * 88

    trio.run(_expecting, run)


@pytest.mark.parametrize("ends", ["removed", "shorter than expected", "goes to Python", "never"])
def test_a_read_of_expected_bytes_that_do_not_come_goes_to_python(ends: str) -> None:
    async def run(fake_kernel: Kernel, windows: ReadWindows) -> None:
        windows.add(0, bytes(PIECE), False)
        windows.expect(PIECE, PIECE)
        number = fake_kernel.send_read(7, PIECE - 10, PIECE + 10)
        await no_answer(fake_kernel)
        if ends == "removed":
            windows.remove(PIECE)
        elif ends == "shorter than expected":
            windows.add(PIECE, bytes(PIECE - 1), False)
        elif ends == "goes to Python":
            windows.add(PIECE, bytes(PIECE), True)
        assert await fake_kernel.answer() == (number, 0, PYTHON_BYTES)

    trio.run(_expecting, run)


def test_the_time_that_a_read_waits_in_c_counts_as_waiting_for_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The deadline is counted from the moment when the device thread read the request."""
    waited: list[int] = []

    async def read(_self: Operations, _fh: int, _off: int, _size: int) -> bytes:
        waited.append(device.NANOSECONDS_WAITED.value)
        return PYTHON_BYTES

    async def run(fake_kernel: Kernel, windows: ReadWindows) -> None:
        windows.expect(0, PIECE)
        assert (await fake_kernel.read(7, 0, 10))[1]
        assert waited[0] >= PATIENCE_NS

    monkeypatch.setattr(Operations, "read", read)
    trio.run(_expecting, run)


def test_reads_beyond_the_number_that_may_wait_go_to_python() -> None:
    async def run(fake_kernel: Kernel, windows: ReadWindows) -> None:
        windows.expect(0, PIECE)
        sent = [fake_kernel.send_read(7, 0, 10) for _ in range(MAX_WAITING + 10)]
        early = [(await fake_kernel.answer())[::2] for _ in range(10)]
        assert early == [(number, PYTHON_BYTES) for number in sent[MAX_WAITING:]]
        windows.add(0, b"x" * PIECE, False)
        later = [(await fake_kernel.answer())[::2] for _ in range(MAX_WAITING)]
        assert later == [(number, b"x" * 10) for number in sent[:MAX_WAITING]]

    trio.run(_expecting, run)


def test_a_session_may_end_while_reads_wait() -> None:
    async def run(fake_kernel: Kernel, windows: ReadWindows) -> None:
        windows.expect(0, PIECE)
        for _ in range(10):
            fake_kernel.send_read(7, 0, 10)
        await no_answer(fake_kernel)

    threads = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        trio.run(_expecting, run)
    assert len(os.listdir("/proc/self/task")) <= threads, "no thread of a session is left"


def test_reads_are_never_torn_while_buffers_come_and_go() -> None:
    """Each read gets the bytes that were there at some moment, or goes to Python. Neither side waits."""

    async def run(fake_kernel: Kernel, windows: ReadWindows) -> None:
        dice = random.Random(33)
        for round_ in range(300):
            sent = []
            for _ in range(20):
                leaf, act = dice.randrange(6), dice.randrange(4)
                if act == 0:
                    windows.remove(leaf * SMALL)
                elif act == 1:
                    windows.expect(leaf * SMALL, SMALL)
                else:
                    windows.add(leaf * SMALL, bytearray([round_ % 256]) * SMALL, dice.random() < 0.2)
                sent.append(fake_kernel.send_read(7, leaf * SMALL, 2 * SMALL))
            for leaf in range(6):
                windows.remove(leaf * SMALL)
            while sent:
                number, error, got = await fake_kernel.answer()
                sent.remove(number)
                assert error == 0
                if got != PYTHON_BYTES:
                    assert len(got) == 2 * SMALL
                    assert len(set(got[:SMALL])) == len(set(got[SMALL:])) == 1
                    assert {got[0], got[SMALL]} == {round_ % 256}

    trio.run(_expecting, run)


# -- staged leaves -------------------------------------------------------------------------------------------


@contextmanager
def staging(folder: Path, content: bytes) -> Iterator[tuple[int, Path]]:
    """The descriptor of a folder with one staging file, and that file."""
    path = folder / NAME.decode()
    path.write_bytes(content)
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield opened, path
    finally:
        os.close(opened)


def allow(folder: int, content: bytes, leaf: int, inode: int = 1) -> None:
    part = content[leaf * LEAF : (leaf + 1) * LEAF]
    ReadWindows(3, inode, CID).allow(folder, NAME, leaf * LEAF, len(part), tags_of(part, PIECE))


def leave_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def read_right(fake_kernel: Kernel, content: bytes, offset: int, size: int, inode: int = 1) -> bool:
    """Returns whether Python was asked. If not, checks the bytes."""
    got, asked = await fake_kernel.read(3, offset, size, inode)
    assert got == (PYTHON_BYTES if asked else content[offset : offset + size])
    return asked


@pytest.mark.parametrize("cached", [True, False], ids=["in the page cache", "on the disk"])
def test_small_reads_of_allowed_leaves_are_answered_in_c(tmp_path: Path, cached: bool) -> None:
    content, dice = random_bytes(6 * LEAF, 1), random.Random(2)

    async def main() -> None:
        with staging(tmp_path, content) as (folder, path):
            async with kernel() as fake_kernel:
                for leaf in (4, 0, 1, 3):
                    allow(folder, content, leaf)
                within = 0
                for _ in range(1000):
                    if not cached:
                        leave_page_cache(path)
                    offset, size = dice.randrange(len(content)), dice.choice([1, 4096, PIECE, 3 * PIECE])
                    leaf, last = offset // LEAF, (offset + size - 1) // LEAF
                    inside = leaf == last and leaf in (0, 1, 3, 4)
                    within += inside
                    passed_on = inside and within % PASSED_ON == 0
                    assert await read_right(fake_kernel, content, offset, size) == (not inside or passed_on)

    trio.run(main)


def test_no_flipped_bit_is_given_from_a_staging_file(tmp_path: Path) -> None:
    content, dice = random_bytes(6 * LEAF, 3), random.Random(4)

    async def main() -> None:
        with staging(tmp_path, content) as (folder, path):
            async with kernel() as fake_kernel:
                for leaf in range(6):
                    allow(folder, content, leaf)
                answered = 0
                for number in range(FLIPS):
                    flip(path, at := dice.randrange(len(content)))
                    if number % 8 == 0:
                        leave_page_cache(path)
                    near = min(max(0, at + dice.randrange(-2 * PIECE, PIECE)), len(content) - 1)
                    asked = await read_right(fake_kernel, content, near, min(4096, len(content) - near))
                    answered += not asked
                    if near <= at < near + 4096:
                        assert asked
                    flip(path, at)
                assert answered > FLIPS // 4

    trio.run(main)


def test_a_read_that_fails_on_the_staging_file_goes_to_python(tmp_path: Path) -> None:
    content = random_bytes(2 * LEAF, 5)

    async def main() -> None:
        with staging(tmp_path, content) as (folder, path):
            async with kernel() as fake_kernel:
                allow(folder, content, 0)
                assert not await read_right(fake_kernel, content, 9, 4096)
                assert await read_right(fake_kernel, content, 9, 4096, inode=2)
                path.write_bytes(content[:4096])
                assert await read_right(fake_kernel, content, 5000, 9), "the file was cut off"
                path.unlink()
                assert await read_right(fake_kernel, content, 9, 4096), "the file was evicted"
                path.symlink_to(tmp_path / "elsewhere")
                (tmp_path / "elsewhere").write_bytes(content)
                assert await read_right(fake_kernel, content, 9, 4096), "the file is a symlink"
                path.unlink()
                os.mkfifo(path)
                assert await read_right(fake_kernel, content, 9, 4096), "the file is a pipe"
                path.unlink()
                path.with_suffix(".part").write_bytes(content)
                part = tags_of(content[:LEAF], PIECE)
                ReadWindows(3, 1, CID).allow(folder, NAME + b".part", 0, LEAF, part)
                assert not await read_right(fake_kernel, content, 9, 4096), "the new name is known"

    trio.run(main)


def test_a_reused_inode_gives_no_bytes_of_the_old_file(tmp_path: Path) -> None:
    content = random_bytes(2 * LEAF, 6)

    def opened(cid: Cid) -> None:
        ReadWindows(3, 1, cid)

    async def main() -> None:
        with staging(tmp_path, content) as (folder, _path):
            async with kernel() as fake_kernel:
                allow(folder, content, 0)
                opened(CID)
                assert not await read_right(fake_kernel, content, 0, 9)
                opened(OTHER)
                assert await read_right(fake_kernel, content, 0, 9)

    trio.run(main)


def test_tags_are_bounded_and_those_of_the_least_recently_read_file_are_dropped(tmp_path: Path) -> None:
    """Four files, each with tags for a third of the bound. Only the first piece of each leaf exists."""
    content = random_bytes(PIECE, 7)
    count = (HELD // 3 - 2000) // TAG_BYTES
    tags = tags_of(content, PIECE) + bytes((count - 1) * TAG_BYTES)

    async def main() -> None:
        with staging(tmp_path, content) as (folder, _path):
            async with kernel() as fake_kernel:

                async def asked(inode: int) -> bool:
                    return await read_right(fake_kernel, content, 0, 9, inode)

                for inode in (1, 2, 3):
                    ReadWindows(3, inode, CID).allow(folder, NAME, 0, count * PIECE, tags)
                assert not await asked(1)
                ReadWindows(3, 4, CID).allow(folder, NAME, 0, count * PIECE, tags)
                assert [await asked(inode) for inode in (1, 2, 3, 4)] == [False, True, False, False]
                ReadWindows(3, 5, CID).allow(folder, NAME, 0, 4 * count * PIECE, 4 * tags)
                assert await asked(5), "its tags take more than the bound"

    trio.run(main)


def test_many_reads_from_the_disk_are_each_answered_once(tmp_path: Path) -> None:
    """There are more reads than threads, and more than may wait for a thread. Each is answered once."""
    content = random_bytes(6 * LEAF, 8)

    async def main() -> None:
        with staging(tmp_path, content) as (folder, path):
            async with kernel() as fake_kernel:
                for leaf in range(6):
                    allow(folder, content, leaf)
                for round_ in range(5):
                    leave_page_cache(path)
                    sent = {}
                    for number in range(120):  # as many as the socket holds
                        offset = (number * 7919 + round_) % (len(content) - LEAF)
                        sent[fake_kernel.send_read(3, offset, 100)] = offset
                    while sent:
                        with trio.fail_after(30):
                            number, error, got = await fake_kernel.answer()
                        offset = sent.pop(number)
                        assert error == 0
                        assert got in (PYTHON_BYTES, content[offset : offset + 100])

    trio.run(main)


@asynccontextmanager
async def interruptible(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kernel]:
    """A session in which a read that reaches Python waits until it is interrupted."""
    calls: dict[int, trio.CancelScope] = {}

    async def wait(_self: Operations, _fh: int, _off: int, _size: int) -> None:
        number = device.REQUEST_NUMBER.value
        with trio.CancelScope() as calls[number]:
            await trio.sleep_forever()
        raise pyfuse3.FUSEError(errno.EINTR)

    monkeypatch.setattr(Operations, "read", wait)
    async with interrupting(calls) as fake_kernel:
        with trio.fail_after(60):
            yield fake_kernel


def test_a_read_that_is_interrupted_while_it_waits_for_the_disk_is_interrupted_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes on the disk are wrong, so each read goes to Python in the end. Its INTERRUPT came before
    Python knew of the read."""
    content = random_bytes(40 * LEAF, 21)

    async def main() -> None:
        with staging(tmp_path, bytes(len(content))) as (folder, path):
            async with interruptible(monkeypatch) as fake_kernel:
                for leaf in range(40):
                    allow(folder, content, leaf)
                    leave_page_cache(path)
                    number = fake_kernel.send_read(3, leaf * LEAF, PIECE)
                    fake_kernel.send(INTERRUPT, 0, struct.pack("<Q", number))
                    assert await fake_kernel.answer() == (number, -errno.EINTR, b"")

    trio.run(main)


def test_a_read_that_is_interrupted_while_it_waits_for_bytes_is_interrupted_in_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with interruptible(monkeypatch) as fake_kernel:
            ReadWindows(7, 1, CID).expect(0, PIECE)
            for _ in range(40):
                others = [fake_kernel.send_read(7, 0, 10) for _ in range(2)]
                number = fake_kernel.send_read(7, 0, 10)
                fake_kernel.send(INTERRUPT, 0, struct.pack("<Q", number))
                assert await fake_kernel.answer() == (number, -errno.EINTR, b"")
                for other in others:
                    fake_kernel.send(INTERRUPT, 0, struct.pack("<Q", other))
                    assert await fake_kernel.answer() == (other, -errno.EINTR, b"")

    trio.run(main)


ONE_HANGING_READ = """
import ipfsfuse.fuse.device  # before pyfuse3
import ctypes, os, socket, time
from pathlib import Path
import trio
from tests.cache.standin import random_bytes
from tests.fuse.kernel_side import kernel
from tests.fuse.test_device_reads import LEAF, allow, leave_page_cache, staging

reads = ctypes.CDLL(os.environ["LIBRARY"]).hanging_reads
content, folder = random_bytes(LEAF, 1), Path(os.environ["STAGING"])


async def session(folder, answers):
    async with kernel() as fake_kernel:
        descriptors = set(os.listdir("/proc/self/fd"))
        allow(folder, content, 0)
        fake_kernel.send_read(3, 9, 100)
        if answers:
            await fake_kernel.answer()
            return descriptors
        with trio.fail_after(20):
            while not reads():
                await trio.sleep(0.01)
    return descriptors


with staging(folder, content) as (opened, path):
    leave_page_cache(path)
    gone = trio.run(session, opened, False) - set(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for number in map(int, gone - {str(ours.fileno()), str(theirs.fileno())}):
        os.dup2(theirs.fileno(), number)
    Path(os.environ["HANGING_READ"]).touch()
    while reads():
        time.sleep(0.01)
    ours.settimeout(0.5)
    try:
        print("written:", ours.recv(1000))
    except TimeoutError:
        print("nothing was written")
    trio.run(session, opened, True)
"""


def run_with(library: str, script: str, folder: Path, **env: str) -> str:
    """The output of a Python script. In its process `library`.c takes the place of a function of the C
    library."""
    built = folder / f"{library}.so"
    source = Path(__file__).with_name(f"{library}.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-o", built, source, "-ldl"], check=True)
    preload = ":".join(filter(None, (str(built), os.environ.get("LD_PRELOAD"))))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"LD_PRELOAD": preload, "LIBRARY": str(built), "PYTHONPATH": os.getcwd()} | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_read_that_outlasts_its_mount_writes_to_no_other_file(tmp_path: Path) -> None:
    """By then the descriptor of the device may belong to another file."""
    (staging := tmp_path / "staging").mkdir()
    go = str(tmp_path / "go")
    printed = run_with("hanging_read", ONE_HANGING_READ, tmp_path, HANGING_READ=go, STAGING=str(staging))
    assert printed == "nothing was written\n"


READS_OF_A_REMOVED_WINDOW = """
import ipfsfuse.fuse.device  # before pyfuse3
import ctypes, os
import trio
from ipfsfuse.fuse.device import ReadWindows
from tests.fuse.kernel_side import PYTHON_BYTES, kernel
from tests.fuse.test_device_reads import CID

large_replies = ctypes.CDLL(os.environ["LIBRARY"]).large_replies


async def main():
    windows = ReadWindows(7, 1, CID)
    async with kernel() as fake_kernel:
        windows.add(0, bytes(2000), False)
        for _ in range(10):
            fake_kernel.send_read(7, 0, 2000)
        while not large_replies():
            pass
        windows.remove(0)
        answers = [await fake_kernel.answer() for _ in range(10)]
        print("answered in C:", sum(got != PYTHON_BYTES for _number, _error, got in answers))


trio.run(main)
"""


def test_removing_a_window_waits_only_for_the_read_that_is_being_answered(tmp_path: Path) -> None:
    """Further reads of it may wait, but `remove` does not wait for them: it holds Python's lock."""
    assert run_with("waiting_remover", READS_OF_A_REMOVED_WINDOW, tmp_path) == "answered in C: 1\n"
