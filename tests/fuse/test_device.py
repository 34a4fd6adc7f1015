"""The device thread: which requests it passes on or holds back, and how it ends."""

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


def test_requests_beyond_the_bound_reach_python_in_the_end() -> None:
    """While Python is busy, the thread stops reading at its bound. When there is room, it goes on."""

    async def main() -> None:
        sent: list[int] = []

        def send_all() -> None:
            for first in range(1, 200_000, 1_000):
                fake_kernel.send(BATCH_FORGET, 0, forgets(first))
                sent.append(first)

        async with kernel() as fake_kernel:
            with ThreadPoolExecutor(1) as crowd:
                sending = crowd.submit(send_all)
                before = -1
                while len(sent) != before:  # the event loop stands still
                    before = len(sent)
                    time.sleep(0.2)  # noqa: ASYNC251  # the test needs that
                assert not sending.done(), "3 MB were sent, of which 1 MB may wait"
                await trio.to_thread.run_sync(sending.result)
            forgotten = fake_kernel.operations.forgotten
            all_of_them = 200_000 * 200_001 // 2
            await trio.to_thread.run_sync(wait_until, lambda: forgotten.total() == all_of_them, "all arrive")
            assert fake_kernel.operations.forgotten == Counter({inode: inode for inode in range(1, 200_001)})

    trio.run(main)


def test_users_take_turns() -> None:
    """However many requests of one user wait for Python, requests of other users are taken in between.
    FORGETs name no user, and do not delay these requests either."""

    async def main() -> None:
        async with kernel() as fake_kernel:
            order = dict[int, str]()
            for number in range(500):
                fake_kernel.send(BATCH_FORGET, 0, struct.pack("<IIQQ", 1, 0, 5, 1))
                order[fake_kernel.send(OPEN, 5, OPENING, user=1000)] = f"crowd {number}"
            for number in range(3):
                order[fake_kernel.send(OPEN, 6, OPENING, user=1001)] = f"other {number}"
                order[fake_kernel.send(OPEN, 7, OPENING, user=0)] = f"root {number}"
            time.sleep(0.3)  # noqa: ASYNC251  # the event loop stands still until the thread has read all
            answers = [order[(await fake_kernel.answer())[0]] for _ in order]
            assert [each for each in answers if each.startswith("crowd")] == [
                f"crowd {n}" for n in range(500)
            ]
            assert [each for each in answers if each.startswith("other")] == [f"other {n}" for n in range(3)]
            assert max(answers.index(f"{user} 2") for user in ("other", "root")) < 20, answers[:30]
            assert fake_kernel.operations.forgotten == {5: 500}

    trio.run(main)


def test_a_session_ends_while_requests_go_on() -> None:
    """A kernel that never stops asking can't keep the thread alive."""

    async def main() -> None:
        stop, ended = threading.Event(), threading.Event()

        def go_on() -> None:
            with suppress(OSError):  # the answers are not read: at some time there is no room for more
                while not stop.is_set():
                    fake_kernel.send(OPEN, 7, OPENING)

        def watch() -> bool:
            in_time = ended.wait(30)
            stop.set()
            return in_time

        with ThreadPoolExecutor(2) as crowd:
            async with kernel() as fake_kernel:
                device.allow(7)
                crowd.submit(go_on)
                await trio.to_thread.run_sync(wait_until, device.drain, "some files are open")
                watching = crowd.submit(watch)
            ended.set()
            assert watching.result(), "the session ended while requests still came"

    trio.run(main)


def test_an_idle_session_uses_no_cpu() -> None:
    async def main() -> None:
        async with kernel() as fake_kernel:
            await fake_kernel.open(1)
            before = time.process_time()
            await trio.sleep(1)
            assert time.process_time() - before < 0.5

    trio.run(main)
