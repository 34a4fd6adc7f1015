"""The context of each call of the kernel: its caller, its deadline, and the errors that it may give."""

import errno
from collections import defaultdict

import pyfuse3
import pytest
import trio
from trio.testing import MockClock

from ipfsfuse.errors import NotFound
from ipfsfuse.fuse import device
from ipfsfuse.fuse.operations import ANSWER_GRACE_SECONDS, LEAST, SPREAD, Operations
from ipfsfuse.sources.base import current_request
from ipfsfuse.structures import Histogram


@pytest.fixture(autouse=True)
def no_request_has_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resets what an earlier test made the device count."""
    monkeypatch.setattr(device.NANOSECONDS_WAITED, "value", 0)


def operations(deadline: float) -> Operations:
    """Operations without a mount: the tests use nothing else of them."""
    made = Operations.__new__(Operations)
    made._deadline, made._calls, made.latencies = deadline, {}, defaultdict(Histogram)
    return made


@pytest.mark.logs("answered ETIMEDOUT")
def test_a_call_that_waits_is_answered_soon_after_its_deadline() -> None:
    async def main() -> None:
        with pytest.raises(pyfuse3.FUSEError) as raised, operations(3)._call(1000, "read"):
            await trio.sleep_forever()
        assert raised.value.errno == errno.ETIMEDOUT
        assert trio.current_time() == pytest.approx(3 + ANSWER_GRACE_SECONDS)

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize(("waited", "left"), [(0.0, 30), (10.0, 20), (1000.0, LEAST)])
def test_the_deadline_is_counted_from_when_the_request_was_read(
    waited: float, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.NANOSECONDS_WAITED, "value", int(waited * 1e9))

    async def main() -> None:
        with operations(30)._call(1000, "read"):
            assert current_request.get().deadline == trio.current_time() + left

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_calls_that_wait_together_end_one_after_the_other() -> None:
    """Thousands of calls that end at one moment would hold up the event loop."""
    ends = list[float]()

    async def wait(calls: Operations, number: int) -> None:
        device.REQUEST_NUMBER.value = number
        with calls._call(1000, "read"):
            await trio.sleep_until(current_request.get().deadline)
            ends.append(trio.current_time())

    async def main() -> None:
        calls = operations(30)
        async with trio.open_nursery() as nursery:
            for number in range(5000):
                nursery.start_soon(wait, calls, number)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert len(ends) == 5000
    assert 30 - SPREAD < ends[0] < ends[-1] <= 30
    together = max(sum(1 for end in ends if at <= end < at + 0.01) for at in ends[::100])
    assert together <= 50


def test_a_call_knows_its_caller_and_deadline_and_leaves_nothing_behind() -> None:
    async def main() -> None:
        await trio.sleep(5)
        before = current_request.get()
        with operations(3)._call(1000, "read"):
            asked = current_request.get()
            assert (asked.caller, asked.deadline) == (1000, trio.current_time() + 3)
            with operations(3)._call(1001, "read"):
                assert current_request.get().caller == 1001
                assert current_request.get().number != asked.number
        assert current_request.get() is before
        with pytest.raises(pyfuse3.FUSEError) as raised, operations(3)._call(1000, "read"):
            raise NotFound("x")
        assert raised.value.errno == errno.ENOENT
        assert current_request.get() is before

    trio.run(main, clock=MockClock(autojump_threshold=0))
