"""INTERRUPT: it reaches the handler of the request that it names."""

import errno
import os
import struct

import pyfuse3
import pytest
import trio

from ipfsfuse.fuse import device
from tests.fuse.kernel_side import OPEN, Kernel, Operations, interrupting
from tests.mounting import wait_until

INTERRUPT = 36
CALLS = 50


def test_it_reaches_the_call_that_it_names_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[int, trio.CancelScope] = {}
    inodes: dict[int, int] = {}

    async def wait(_self: Operations, inode: int, _flags: int, _ctx: object) -> None:
        number = device.REQUEST_NUMBER.value
        inodes[number] = inode
        with trio.CancelScope() as calls[number]:
            await trio.sleep_forever()
        raise pyfuse3.FUSEError(errno.EINTR)

    async def open_and_interrupt(asking: Kernel) -> None:
        numbers = {
            asking.send(OPEN, inode, struct.pack("<II", os.O_RDONLY, 0)): inode for inode in range(2, CALLS)
        }
        ended = list(numbers)[::3]
        for number in ended:  # some are sent before their handler begins
            asking.send(INTERRUPT, 0, struct.pack("<Q", number))
        asking.send(INTERRUPT, 0, struct.pack("<Q", 99_999))  # of a call that was answered meanwhile
        answers = [await asking.answer() for _ in ended]
        # an interrupt overtakes requests that still wait
        await trio.to_thread.run_sync(wait_until, lambda: len(calls) == len(numbers), "all are being served")
        assert sorted(answers) == [(number, -errno.EINTR, b"") for number in ended]
        assert inodes == numbers
        assert sorted(number for number, scope in calls.items() if scope.cancel_called) == ended

    async def main() -> None:
        monkeypatch.setattr(Operations, "open", wait)
        async with interrupting(calls) as asking:
            with trio.fail_after(30):
                await open_and_interrupt(asking)

    trio.run(main)
