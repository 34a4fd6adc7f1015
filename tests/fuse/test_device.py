"""The device thread: what it passes on, what it holds back, and how it ends."""

import os
import struct
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import trio

from ipfsfuse.fuse import device
from tests.fuse.kernel_side import BATCH_FORGET, OPEN, kernel
from tests.mounting import wait_until


def forgets(first: int) -> bytes:
    return struct.pack("<II", 1_000, 0) + b"".join(
        struct.pack("<QQ", inode, inode) for inode in range(first, first + 1_000)
    )


def test_more_than_may_wait_for_python_comes_in_the_end() -> None:
    """While Python is busy the thread reads no further than its bound; when there is room, it goes on."""

    async def main() -> None:
        sent: list[int] = []

        def send_all() -> None:
            for first in range(1, 200_000, 1_000):
                asking.send(BATCH_FORGET, 0, forgets(first))
                sent.append(first)

        async with kernel() as asking:
            with ThreadPoolExecutor(1) as crowd:
                sending = crowd.submit(send_all)
                before = -1
                while len(sent) != before:  # the event loop stands still
                    before = len(sent)
                    time.sleep(0.2)  # noqa: ASYNC251  # that is what it is for
                assert not sending.done(), "3 MB, of which 1 may wait"
                await trio.to_thread.run_sync(sending.result)
            await asking.open(1)
            assert asking.operations.forgotten == Counter({inode: inode for inode in range(1, 200_001)})

    trio.run(main)


def test_a_session_ends_while_requests_go_on() -> None:
    """A kernel that never stops asking can't keep the thread alive."""

    async def main() -> None:
        stop, ended = threading.Event(), threading.Event()

        def go_on() -> None:
            with suppress(OSError):  # nobody reads the answers: at some time there is no room for more
                while not stop.is_set():
                    asking.send(OPEN, 7, struct.pack("<II", os.O_RDONLY, 0))

        def watch() -> bool:
            in_time = ended.wait(30)
            stop.set()
            return in_time

        with ThreadPoolExecutor(2) as crowd:
            async with kernel() as asking:
                device.allow(7)
                crowd.submit(go_on)
                await trio.to_thread.run_sync(wait_until, device.drain, "some are open")
                watching = crowd.submit(watch)
            ended.set()
            assert watching.result(), "it ended by itself"

    trio.run(main)


def test_who_is_asked_nothing_sleeps() -> None:
    async def main() -> None:
        async with kernel() as asking:
            await asking.open(1)
            before = time.process_time()
            await trio.sleep(1)
            assert time.process_time() - before < 0.5

    trio.run(main)
