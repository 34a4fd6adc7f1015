"""INIT: the answer of libfuse, and the flags and limits that we add to it."""

import errno
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from ipfsfuse.errors import MountFailed
from ipfsfuse.fuse import device
from tests.fuse.kernel_side import INIT, uninitialized
from tests.mounting import fuse_mounts, wait_until

PARALLEL_DIROPS, CACHE_SYMLINKS = 1 << 18, 1 << 23
NEEDED = 1 | 1 << 13 | 1 << 14
"""Without these (readdirplus, for one) pyfuse3 ends the session."""


def init(offered: int, readahead: bool = True) -> tuple[int, int, int, int, int, bool]:
    """max_readahead, flags, max_background, congestion_threshold and max_write of the answer to a kernel that
    offers the flags `offered`; and whether directory operations are parallel."""

    async def main() -> tuple[int, int, int, int, int, bool]:
        async with uninitialized(readahead) as (fake_kernel, device):
            answer = await fake_kernel.ask(INIT, 0, struct.pack("<IIII", 7, 31, 131072, offered))
            assert len(answer) == 64
            return *struct.unpack_from("<8xIIHHI", answer), await device.initialized()

    return trio.run(main)


def test_the_answer_takes_offered_flags_and_asks_for_room_for_thousands_of_requests() -> None:
    readahead, flags, background, congestion, max_write, parallel = init(
        PARALLEL_DIROPS | CACHE_SYMLINKS | NEEDED
    )
    assert flags & (PARALLEL_DIROPS | CACHE_SYMLINKS) == PARALLEL_DIROPS | CACHE_SYMLINKS
    assert (readahead, background, congestion, max_write) == (131072, 4096, 3072, 128 << 10)
    assert parallel


def test_the_answer_asks_for_nothing_that_was_not_offered() -> None:
    _readahead, flags, *_rest, parallel = init(CACHE_SYMLINKS | NEEDED)
    assert flags & (PARALLEL_DIROPS | CACHE_SYMLINKS) == CACHE_SYMLINKS
    assert not parallel


def test_a_recording_mount_has_no_kernel_read_ahead() -> None:
    assert init(NEEDED, readahead=False)[0] == 0


def test_a_mount_that_ends_before_init_is_answered_does_not_count_as_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real kernel is too quick for this, so its answer to our reply is faked."""

    async def main() -> bool:
        async with uninitialized(True) as (_fake_kernel, opened):
            monkeypatch.setattr(device._LIBRARY, "reply_init_result", lambda: -errno.ENOENT)
            with trio.move_on_after(0.1) as waiting:
                await opened.initialized()
            return waiting.cancelled_caught

    assert trio.run(main)


NO_THREAD = """
import resource, sys
from pathlib import Path
from ipfsfuse.errors import MountFailed
from ipfsfuse.fuse import device, session
import pyfuse3

class Limited(device.Device):
    def __init__(self, readahead, passthrough):
        super().__init__(readahead, passthrough)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 20), -1))  # a thread's stack takes 8 MiB

session.Device = Limited
resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, -1))
try:
    with session.open_session(pyfuse3.Operations(), session.MountHelper(Path(sys.argv[1]), False), True):
        pass
except MountFailed as exc:
    print(exc)
"""


@pytest.mark.fuse
def test_a_device_thread_that_cannot_be_started_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_THREAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "the thread that reads the device can't be started: " in done.stdout, done.stderr
    wait_until(lambda: not fuse_mounts(tmp_path), "fusermount3 has unmounted it")


def test_a_refusal_by_libfuse_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with uninitialized() as (fake_kernel, device):
            number = fake_kernel.send(INIT, 0, struct.pack("<IIII", 6, 0, 0, 0))
            assert (await fake_kernel.answer())[:2] == (number, -71)  # EPROTO
            with pytest.raises(MountFailed, match="libfuse refused INIT: Protocol error"):
                await device.initialized()

    trio.run(main)
    assert "unsupported protocol version" in capfd.readouterr().err
