"""Single flight of batches: each key of a batch arrives on its own."""

import gc
import weakref

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ipfsfuse.cache.single_flight import Batch, SingleFlight
from ipfsfuse.errors import Unavailable
from tests.cache.test_single_flight import Fetcher


def test_the_keys_of_a_batch_arrive_one_by_one_and_waiters_fetch_the_rest_alone() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery)
            first, second, alone, got = trio.Event(), trio.Event(), Fetcher("alone"), dict[str, str]()
            alone.gate.set()

            async def fetch(batch: Batch[str, str]) -> None:
                assert batch.keys == ["a", "b", "c"]
                batch.resolve("a", "by batch")
                await first.wait()
                batch.staged("a")
                await second.wait()
                batch.resolve("b", "by batch")
                raise Unavailable("c is not to be had")

            async def reader(key: str) -> None:
                got[key] = await flights.join(key, alone)

            async with trio.open_nursery() as readers:
                readers.start_soon(flights.run_batch, ["a", "b", "c"], fetch)
                await wait_all_tasks_blocked()
                assert await flights.join("a", alone) == "by batch", (
                    "until a value is staged, it serves all callers"
                )
                assert alone.calls == 0
                first.set()
                await wait_all_tasks_blocked()
                assert "a" not in flights
                readers.start_soon(reader, "b")
                readers.start_soon(reader, "c")
                await wait_all_tasks_blocked()
                assert got == {}
                second.set()
            assert got == {"b": "by batch", "c": "alone"}
            assert alone.calls == 1

    trio.run(main)


def test_a_batch_goes_on_without_its_caller_only_as_long_as_others_wait() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery)
            gate, ended, got = trio.Event(), list[str](), list[str]()

            async def fetch(batch: Batch[str, str]) -> None:
                try:
                    await gate.wait()
                    batch.resolve("a", "value")
                    await trio.sleep_forever()
                finally:
                    ended.append("batch")

            async def reader() -> None:
                got.append(await flights.join("a", Fetcher()))

            caller = trio.CancelScope()

            async def ahead() -> None:
                with caller:
                    await flights.run_batch(["a", "b"], fetch)

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
            assert (got, ended, len(flights)) == (["value"], ["batch"], 0)

    trio.run(main)


def test_a_batch_in_which_no_key_arrives_for_a_deadline_is_given_up() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery, deadline=10)

            async def fetch(batch: Batch[str, str]) -> None:
                for key in "ab":
                    await trio.sleep(8)
                    batch.resolve(key, "value")
                await trio.sleep_forever()

            await flights.run_batch("abc", fetch)
            assert trio.current_time() == pytest.approx(26)
            await wait_all_tasks_blocked()
            assert len(flights) == 0

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_started_batch_may_expect_more_keys_and_callers_of_them_wait_for_it() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery)
            gate, alone, got = trio.Event(), Fetcher("alone"), dict[str, str]()
            alone.gate.set()

            async def fetch(batch: Batch[str, str]) -> None:
                batch.expect(["b", "taken", "never"])
                batch.resolve("a", "by batch")
                batch.expect(["a"])
                assert (list(batch.keys), "a" in batch, "b" in batch) == (["b", "never"], False, True)
                await gate.wait()
                batch.resolve("b", "by batch")
                batch.resolve("b", "again")
                batch.resolve("nobody's", "by batch")

            async def reader(key: str) -> None:
                got[key] = await flights.join(key, alone)

            async with trio.open_nursery() as readers:
                taken = Fetcher("by its own")
                readers.start_soon(flights.join, "taken", taken)
                await wait_all_tasks_blocked()
                batch = flights.start_batch(["a"], fetch)
                await wait_all_tasks_blocked()
                for key in ("b", "never"):
                    readers.start_soon(reader, key)
                await wait_all_tasks_blocked()
                assert (got, alone.calls, batch.ended.is_set()) == ({}, 0, False)
                gate.set()
                taken.gate.set()
            assert got == {"b": "by batch", "never": "alone"}
            assert (batch.ended.is_set(), len(flights)) == (True, 0)
            assert flights.start_batch([], fetch).ended.is_set()

    trio.run(main)


def test_a_staged_value_is_not_kept_in_memory_while_the_batch_goes_on() -> None:
    class Value:
        pass

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, Value] = SingleFlight(nursery)
            values: list[weakref.ref[Value]] = []

            async def fetch(batch: Batch[str, Value]) -> None:
                for key in "ab":
                    value = Value()
                    values.append(weakref.ref(value))
                    batch.resolve(key, value)
                    batch.staged(key)
                del value
                await trio.sleep_forever()

            batch = flights.start_batch("abc", fetch)
            await wait_all_tasks_blocked()
            gc.collect()
            assert [value() for value in values] == [None, None]
            assert not batch.ended.is_set()
            nursery.cancel_scope.cancel()

    trio.run(main)
