"""Single flight of a run of keys: each lands on its own."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ipfsfuse.cache.flights import Flights, Ride
from ipfsfuse.errors import Unavailable
from tests.cache.test_flights import Fetcher


def test_a_run_lands_keys_one_by_one_and_leaves_the_rest_to_who_waits() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: Flights[str, str] = Flights(nursery)
            first, second, alone, got = trio.Event(), trio.Event(), Fetcher("alone"), dict[str, str]()
            alone.gate.set()

            async def run(ride: Ride[str, str]) -> None:
                assert ride.keys == ["a", "b", "c"]
                ride.land("a", "by run")
                await first.wait()
                ride.kept("a")
                await second.wait()
                ride.land("b", "by run")
                raise Unavailable("c is not to be had")

            async def reader(key: str) -> None:
                got[key] = await flights.join(key, alone)

            async with trio.open_nursery() as readers:
                readers.start_soon(flights.run, ["a", "b", "c"], run)
                await wait_all_tasks_blocked()
                assert await flights.join("a", alone) == "by run", "until it is kept, what landed serves who comes"
                assert alone.calls == 0
                first.set()
                await wait_all_tasks_blocked()
                assert "a" not in flights
                readers.start_soon(reader, "b")
                readers.start_soon(reader, "c")
                await wait_all_tasks_blocked()
                assert got == {}
                second.set()
            assert got == {"b": "by run", "c": "alone"}
            assert alone.calls == 1

    trio.run(main)


def test_a_run_goes_on_without_its_caller_while_anyone_waits_and_no_longer() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: Flights[str, str] = Flights(nursery)
            gate, ended, got = trio.Event(), list[str](), list[str]()

            async def run(ride: Ride[str, str]) -> None:
                try:
                    await gate.wait()
                    ride.land("a", "value")
                    await trio.sleep_forever()
                finally:
                    ended.append("run")

            async def reader() -> None:
                got.append(await flights.join("a", Fetcher()))

            caller = trio.CancelScope()

            async def ahead() -> None:
                with caller:
                    await flights.run(["a", "b"], run)

            async with trio.open_nursery() as readers:
                readers.start_soon(ahead)
                await wait_all_tasks_blocked()
                readers.start_soon(reader)
                await wait_all_tasks_blocked()
                caller.cancel()
                await wait_all_tasks_blocked()
                assert ended == []
                gate.set()
            await wait_all_tasks_blocked()
            assert (got, ended, len(flights)) == (["value"], ["run"], 0)

    trio.run(main)


def test_a_run_in_which_nothing_lands_for_a_deadline_is_given_up() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: Flights[str, str] = Flights(nursery, deadline=10)

            async def run(ride: Ride[str, str]) -> None:
                for key in "ab":
                    await trio.sleep(8)
                    ride.land(key, "value")
                await trio.sleep_forever()

            await flights.run("abc", run)
            assert trio.current_time() == pytest.approx(26)
            await wait_all_tasks_blocked()
            assert len(flights) == 0

    trio.run(main, clock=MockClock(autojump_threshold=0))
