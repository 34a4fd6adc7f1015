"""INTERRUPT reaches the handler of the request that it names."""

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


def test_an_interrupt_reaches_only_the_call_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[int, trio.CancelScope] = {}
    inodes: dict[int, int] = {}

    async def wait(_self: Operations, inode: int, _flags: int, _ctx: object) -> None:
        number = device.REQUEST_NUMBER.value
        inodes[number] = inode
        with trio.CancelScope() as calls[number]:
            await trio.sleep_forever()
        raise pyfuse3.FUSEError(errno.EINTR)

    async def open_and_interrupt(fake_kernel: Kernel) -> None:
        numbers = {
            fake_kernel.send(OPEN, inode, struct.pack("<II", os.O_RDONLY, 0)): inode
            for inode in range(2, CALLS)
        }
        ended = list(numbers)[::3]
        for number in ended:  # some are sent before the handler of their call begins
            fake_kernel.send(INTERRUPT, 0, struct.pack("<Q", number))
        fake_kernel.send(INTERRUPT, 0, struct.pack("<Q", 99_999))  # names a call that was answered meanwhile
        answers = [await fake_kernel.answer() for _ in ended]
        # an interrupt overtakes requests that still wait
        await trio.to_thread.run_sync(
            wait_until, lambda: len(calls) == len(numbers), "all calls are being served"
        )
        assert sorted(answers) == [(number, -errno.EINTR, b"") for number in ended]
        assert inodes == numbers
        assert sorted(number for number, scope in calls.items() if scope.cancel_called) == ended

    async def main() -> None:
        monkeypatch.setattr(Operations, "open", wait)
        async with interrupting(calls) as fake_kernel:
            with trio.fail_after(30):
                await open_and_interrupt(fake_kernel)

    trio.run(main)
