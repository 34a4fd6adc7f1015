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

OPENING = struct.pack("<II", os.O_RDONLY, 0)


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
            forgotten = asking.operations.forgotten
            all_of_them = 200_000 * 200_001 // 2
            await trio.to_thread.run_sync(wait_until, lambda: forgotten.total() == all_of_them, "all")
            assert asking.operations.forgotten == Counter({inode: inode for inode in range(1, 200_001)})

    trio.run(main)


def test_users_take_turns() -> None:
    """However many requests of one user wait for Python, another's are taken in between. FORGETs, which name
    no user, delay none either."""

    async def main() -> None:
        async with kernel() as asking:
            order = dict[int, str]()
            for number in range(500):
                asking.send(BATCH_FORGET, 0, struct.pack("<IIQQ", 1, 0, 5, 1))
                order[asking.send(OPEN, 5, OPENING, user=1000)] = f"crowd {number}"
            for number in range(3):
                order[asking.send(OPEN, 6, OPENING, user=1001)] = f"other {number}"
                order[asking.send(OPEN, 7, OPENING, user=0)] = f"root {number}"
            time.sleep(0.3)  # noqa: ASYNC251  # the event loop stands still until the thread has read all
            answers = [order[(await asking.answer())[0]] for _ in order]
            assert [each for each in answers if each.startswith("crowd")] == [
                f"crowd {n}" for n in range(500)
            ]
            assert [each for each in answers if each.startswith("other")] == [f"other {n}" for n in range(3)]
            assert max(answers.index(f"{user} 2") for user in ("other", "root")) < 20, answers[:30]
            assert asking.operations.forgotten == {5: 500}

    trio.run(main)


def test_a_session_ends_while_requests_go_on() -> None:
    """A kernel that never stops asking can't keep the thread alive."""

    async def main() -> None:
        stop, ended = threading.Event(), threading.Event()

        def go_on() -> None:
            with suppress(OSError):  # nobody reads the answers: at some time there is no room for more
                while not stop.is_set():
                    asking.send(OPEN, 7, OPENING)

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
