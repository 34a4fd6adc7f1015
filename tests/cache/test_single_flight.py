"""Single flight: one fetch serves all waiters, and goes on as long as there is one."""

import math
from collections.abc import AsyncGenerator

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ipfsfuse.cache.single_flight import SingleFlight
from ipfsfuse.errors import Malformed, Unavailable
from ipfsfuse.sources.base import Request, current_request, request_of


class Fetcher:
    """Counts its calls; each waits for `gate`, and then answers or fails."""

    def __init__(self, answer: str = "value", error: Exception | None = None) -> None:
        self.calls = 0
        self.running = 0
        self.cancelled = 0
        self.gate = trio.Event()
        self.answer = answer
        self.error = error

    async def __call__(self) -> AsyncGenerator[str]:
        self.calls += 1
        self.running += 1
        try:
            await self.gate.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error
        yield self.answer


def test_all_callers_share_one_fetch() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery)
            fetch, got = Fetcher(), list[str]()

            async def reader() -> None:
                got.append(await flights.join("k", fetch))

            async with trio.open_nursery() as readers:
                for _ in range(100):
                    readers.start_soon(reader)
                await wait_all_tasks_blocked()
                assert "k" in flights
                fetch.gate.set()
            assert fetch.calls == 1
            assert got == ["value"] * 100
            assert len(flights) == 0

    trio.run(main)


def test_a_fetch_goes_on_for_the_others_when_one_caller_is_cancelled() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery)
            fetch, got = Fetcher(), list[str]()
            first = trio.CancelScope()

            async def impatient() -> None:
                with first:
                    await flights.join("k", fetch)

            async def patient() -> None:
                got.append(await flights.join("k", fetch))

            async with trio.open_nursery() as readers:
                readers.start_soon(impatient)
                await wait_all_tasks_blocked()
                readers.start_soon(patient)
                await wait_all_tasks_blocked()
                first.cancel()
                await wait_all_tasks_blocked()
                assert fetch.running == 1
                fetch.gate.set()
            assert (got, fetch.calls, fetch.cancelled) == (["value"], 1, 0)

    trio.run(main)


def test_a_fetch_is_cancelled_with_its_last_waiter_and_keeps_its_key_until_rolled_back() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery)
            rolled_back, order = trio.Event(), list[str]()

            async def slow_to_roll_back() -> AsyncGenerator[str]:
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await rolled_back.wait()
                    order.append("rolled back")
                yield ""

            async def anew() -> AsyncGenerator[str]:
                order.append("fetched anew")
                yield "new"

            with trio.CancelScope() as scope:
                async with trio.open_nursery() as readers:
                    readers.start_soon(flights.join, "k", slow_to_roll_back)
                    await wait_all_tasks_blocked()
                    scope.cancel()
            assert "k" not in flights  # no caller should count on it

            async with trio.open_nursery() as readers:
                readers.start_soon(flights.join, "k", anew)
                await wait_all_tasks_blocked()
                assert order == []
                rolled_back.set()
            assert order == ["rolled back", "fetched anew"]

    trio.run(main)


def test_a_waiter_gives_up_at_its_deadline_and_the_failure_is_remembered() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery, deadline=30, remember=5)
            fetch = Fetcher()
            with pytest.raises(Unavailable, match="'k': no source gave it within 30 s"):
                await flights.join("k", fetch)
            assert trio.current_time() == pytest.approx(30)
            await wait_all_tasks_blocked()
            assert fetch.cancelled == 1
            with pytest.raises(Unavailable):
                await flights.join("k", fetch)
            assert trio.current_time() == pytest.approx(30)
            assert fetch.calls == 1
            await trio.sleep(5.1)
            fetch.gate.set()
            assert await flights.join("k", fetch) == "value"

    trio.run(main, clock=_from_zero())


def test_a_call_that_wants_several_keys_waits_at_most_until_its_deadline() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery, deadline=30, remember=5)
            fetch = Fetcher()
            with request_of(1000, deadline=30):
                await trio.sleep(20)
                with pytest.raises(Unavailable, match="'k': no source gave it within 10 s"):
                    await flights.join("k", fetch)
                assert trio.current_time() == pytest.approx(30)
                with pytest.raises(Unavailable):
                    await flights.join("other", fetch)
            assert (trio.current_time(), fetch.calls) == (pytest.approx(30), 1)
            await wait_all_tasks_blocked()
            fetch.gate.set()
            with pytest.raises(Unavailable):  # the kernel asks twice for one read
                await flights.join("k", fetch)
            assert await flights.join("other", fetch) == "value", (
                "the call hardly waited for it, so the failure is not remembered"
            )

    trio.run(main, clock=_from_zero())


def test_a_fetch_is_charged_to_all_its_waiters_and_does_not_get_their_deadlines() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery, deadline=30)
            seen: list[Request] = []

            async def fetch() -> AsyncGenerator[str]:
                seen.append(current_request.get())
                await trio.sleep(10)
                yield "value"

            async def reader(caller: int, deadline: float) -> None:
                with request_of(caller, deadline):
                    assert await flights.join("k", fetch) == "value"

            async with trio.open_nursery() as readers:
                readers.start_soon(reader, 1000, 15)
                await trio.sleep(5)
                readers.start_soon(reader, 1001, 100)
            assert (seen[0].caller, seen[0].others) == (1000, {1001})
            assert (seen[0].deadline, seen[0].wanted_until) == (math.inf, 35)

    trio.run(main, clock=_from_zero())


def test_each_waiter_has_its_own_deadline_and_a_value_clears_a_remembered_failure() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery, deadline=30, remember=100)
            fetch, ends = Fetcher(), list[float]()

            async def late() -> None:
                await trio.sleep(20)
                assert await flights.join("k", fetch) == "value"
                ends.append(trio.current_time())

            async def early() -> None:
                with pytest.raises(Unavailable):
                    await flights.join("k", fetch)
                ends.append(trio.current_time())

            async with trio.open_nursery() as readers:
                readers.start_soon(early)
                readers.start_soon(late)
                await trio.sleep(40)
                fetch.gate.set()
            assert ends == pytest.approx([30, 40])
            assert await flights.join("k", fetch) == "value"

    trio.run(main, clock=_from_zero())


def test_a_failure_of_the_sources_is_shared_and_remembered_only_for_its_key() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery, remember=5)
            fetch, failed = Fetcher(error=Malformed("bad block")), list[str]()

            async def reader() -> None:
                with pytest.raises(Malformed, match="bad block"):
                    await flights.join("k", fetch)
                failed.append("k")

            async with trio.open_nursery() as readers:
                readers.start_soon(reader)
                readers.start_soon(reader)
                await wait_all_tasks_blocked()
                fetch.gate.set()
            await reader()
            assert (len(failed), fetch.calls) == (3, 1)
            fetch.error = None
            assert await flights.join("other", fetch) == "value"

    trio.run(main)


def test_a_bug_in_a_fetch_is_raised_to_its_waiters_and_not_remembered() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery)
            fetch = Fetcher(error=ZeroDivisionError())
            fetch.gate.set()
            with pytest.raises(ZeroDivisionError):
                await flights.join("k", fetch)
            fetch.error = None
            assert await flights.join("k", fetch) == "value"

    trio.run(main)


def _from_zero() -> MockClock:
    return MockClock(autojump_threshold=0)
