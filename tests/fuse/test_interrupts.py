"""INTERRUPT: it reaches the handler of the request that it names."""

import errno
import os
import struct

import pyfuse3
import pytest
import trio

from ipfsfuse.fuse import device
from tests.fuse.kernel_side import INIT, OPEN, Kernel, Operations, uninitialized
from tests.mounting import wait_until

INTERRUPT = 36
EVERYTHING = (1 << 20) - 1
CALLS = 50


def test_it_reaches_the_call_that_it_names_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[int, tuple[int, trio.CancelScope]] = {}

    async def wait(_self: Operations, inode: int, _flags: int, _ctx: object) -> None:
        number = device.REQUEST_NUMBER.value
        with trio.CancelScope() as scope:
            calls[number] = inode, scope
            await trio.sleep_forever()
        raise pyfuse3.FUSEError(errno.EINTR)

    async def deliver(reader: device.Device) -> None:
        async for number in reader.interrupted():
            if number in calls:
                calls[number][1].cancel()

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
        assert {number: inode for number, (inode, _scope) in calls.items()} == numbers
        assert sorted(number for number, (_, scope) in calls.items() if scope.cancel_called) == ended

    async def main() -> None:
        monkeypatch.setattr(Operations, "open", wait)
        async with uninitialized() as (asking, reader), trio.open_nursery() as nursery:
            await asking.ask(INIT, 0, struct.pack("<IIII", 7, 31, 1 << 17, EVERYTHING))
            await reader.initialized()
            nursery.start_soon(deliver, reader)
            with trio.fail_after(30):
                await open_and_interrupt(asking)
            nursery.cancel_scope.cancel()

    trio.run(main)
