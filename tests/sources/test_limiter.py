"""How many requests one source is sent at a time, and which one is next: with stalled requests, with several
callers, and at a busy source."""

import contextlib
import os
import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ipfsfuse.cache.single_flight import Fetch
from ipfsfuse.sources.base import Caller, current_request, request_of
from ipfsfuse.sources.pool.limiter import CROWD_SECONDS, NEW, ROTATE_FRESH, ConcurrencyLimiter, Permit

RUNNING, LATE = 16, 128
ALICE, BOB = 1000, 1001


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


class Callers:
    """Sends requests of several callers through one limiter."""

    def __init__(self, limiter: ConcurrencyLimiter, nursery: trio.Nursery) -> None:
        self.limiter = limiter
        self.nursery = nursery
        self.waited: list[float] = []
        self.displaced = 0

    async def request(self, caller: Caller, seconds: float) -> float:
        """Makes a request that takes `seconds`. Makes it again whenever it is displaced. Returns the seconds
        until it first started."""
        with request_of(caller):
            retried, first, waited = False, True, 0.0
            while True:
                began = trio.current_time()
                async with self.limiter.permit(retried, again=not first) as permit:
                    if first:
                        waited = trio.current_time() - began
                        self.waited.append(waited)
                    await trio.sleep(seconds)
                    return waited
                assert permit.displaced
                self.displaced += 1
                first, retried = False, retried or not permit.early

    def crowd(self, count: int, caller: Caller, seconds: float = float("inf")) -> None:
        for _ in range(count):
            self.nursery.start_soon(self.request, caller, seconds)


@pytest.mark.parametrize("late_after", [0.01, 0.4, 2.0])
@pytest.mark.parametrize("count", [1, 144, int(os.environ.get("IPFSFUSE_STALLED", "1500"))])
@pytest.mark.parametrize("caller", [ALICE, BOB])
def test_a_new_request_starts_within_a_tenth_of_a_second_however_many_stalled_ones_wait(
    count: int, late_after: float, caller: Caller
) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            limiter = ConcurrencyLimiter(RUNNING, LATE, lambda: late_after)
            callers = Callers(limiter, nursery)
            callers.crowd(count, ALICE)
            await wait_all_tasks_blocked()
            for pause in (0.001, 0.04, 0.1, 0.5, 1.0, 3.0, 10.0, 60.0):
                await trio.sleep(pause)
                assert limiter.in_flight <= RUNNING + LATE
                with trio.fail_after(
                    NEW + late_after + 0.1
                ):  # it has the time for an answer before it is displaced
                    assert await callers.request(caller, late_after) <= NEW
            nursery.cancel_scope.cancel()

    run(main)


def test_a_growing_crowd_leaves_each_request_the_time_for_an_answer() -> None:
    """Before this was mended, later requests displaced each one before a slow source could answer."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            callers = Callers(ConcurrencyLimiter(RUNNING, LATE, lambda: 0.4), nursery)
            answered: list[float] = []

            async def healthy() -> None:
                await callers.request(ALICE, 0.39)
                answered.append(trio.current_time())

            for _ in range(50):
                nursery.start_soon(healthy)
                callers.crowd(19, ALICE)
                await trio.sleep(0.05)
            await trio.sleep(1)
            assert len(answered) >= 20
            nursery.cancel_scope.cancel()

    run(main)


def test_a_caller_displaces_no_other_and_holds_at_most_three_quarters() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            limiter = ConcurrencyLimiter(RUNNING, LATE, lambda: 0.4)
            callers = Callers(limiter, nursery)
            callers.crowd(1000, ALICE)
            await trio.sleep(30)
            assert limiter.in_flight == limiter.caller_limit == 108
            bobs = Callers(limiter, nursery)
            bobs.crowd(36, BOB)
            await wait_all_tasks_blocked()
            assert limiter.in_flight == 108 + 12, "at once, as many as may begin at once"
            await trio.sleep(2)
            assert limiter.in_flight == RUNNING + LATE
            assert bobs.displaced == 0
            nursery.cancel_scope.cancel()

    run(main)


def test_two_greedy_callers_get_half_each() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            limiter = ConcurrencyLimiter(RUNNING, LATE, lambda: 0.1)
            done: list[Caller] = []

            async def reader(caller: Caller) -> None:
                with request_of(caller):
                    while True:
                        async with limiter.permit():
                            await trio.sleep(0.05)
                            done.append(caller)

            for _ in range(500):
                nursery.start_soon(reader, ALICE)
            await trio.sleep(1)
            for _ in range(20):
                nursery.start_soon(reader, BOB)
            done.clear()
            await trio.sleep(5)
            assert 0.4 <= done.count(BOB) / len(done) <= 0.6
            nursery.cancel_scope.cancel()

    run(main)


def test_untried_requests_go_before_retried_ones_that_have_waited_longer() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            limiter = ConcurrencyLimiter(4, 4, lambda: 0.1)
            callers = Callers(limiter, nursery)
            callers.crowd(50, ALICE)
            await trio.sleep(8 * ROTATE_FRESH + 1)
            assert len(callers.waited) == 50, "each had a first turn"
            nursery.cancel_scope.cancel()

    run(main)


def test_a_crowd_does_not_start_at_once_at_a_source_that_answers() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            limiter = ConcurrencyLimiter(RUNNING, LATE, lambda: 1.0)
            callers = Callers(limiter, nursery)
            callers.crowd(100, ALICE, 1.5)
            await trio.sleep(0.9)
            assert limiter.in_flight <= RUNNING * (1 + NEW / CROWD_SECONDS)
            await trio.sleep(20)
            assert (limiter.in_flight, limiter.waiting, callers.displaced) == (0, 0, 0)

    run(main)


def test_a_second_waiter_makes_a_queued_request_as_urgent_as_its_own() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            limiter = ConcurrencyLimiter(RUNNING, LATE, lambda: 2.0)
            started: list[float] = []

            async def old() -> None:
                current_request.set(request)
                async with limiter.permit():
                    started.append(trio.current_time())

            request = Fetch(ALICE)
            stack = contextlib.ExitStack()
            with request_of(ALICE):
                stack.enter_context(request.waiting(1000))
            callers = Callers(limiter, nursery)
            callers.crowd(100, ALICE)
            await wait_all_tasks_blocked()
            nursery.start_soon(old)
            await wait_all_tasks_blocked()
            callers.crowd(3000, ALICE)
            await trio.sleep(1)
            assert not started, "newer requests go first"
            with request_of(BOB):
                stack.enter_context(request.waiting(1000))
            await wait_all_tasks_blocked()
            assert started == [pytest.approx(trio.current_time())]
            nursery.cancel_scope.cancel()

    run(main)


def test_a_request_whose_caller_gives_up_soon_is_not_started() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            limiter = ConcurrencyLimiter(4, 4, lambda: 0.1)
            began: list[float] = []

            async def reader() -> None:
                request = Fetch(ALICE)
                with request_of(ALICE), trio.move_on_at(5.0), request.waiting(5.0):
                    current_request.set(request)
                    retried = False
                    while True:
                        async with limiter.permit(retried):
                            began.append(trio.current_time())
                            await trio.sleep_forever()
                        retried = True

            for _ in range(100):
                nursery.start_soon(reader)
            await trio.sleep(6)
            assert max(began) < 4.76
            assert (limiter.in_flight, limiter.waiting) == (0, 0)

    run(main)


def test_a_busy_source_is_sent_half_as_many_and_then_one_more_each_round() -> None:
    limiter = ConcurrencyLimiter(RUNNING, LATE, lambda: 1.0)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            callers = Callers(limiter, nursery)
            callers.crowd(12, ALICE, 1.0)
            await wait_all_tasks_blocked()
            asked = trio.current_time()
            await trio.sleep(0.5)
            assert limiter.limit == RUNNING + LATE
            assert limiter.note_busy(asked)
            assert limiter.limit == 6
            assert limiter.note_busy(asked), "answers to requests that were sent together count once"
            assert limiter.limit == 6
            await trio.sleep(1)
            assert limiter.in_flight == 0
            assert not limiter.note_busy(trio.current_time()), "a single request is never too many"
            for limit in range(6, 12):
                for _ in range(limit + 1):
                    async with limiter.permit() as permit:
                        permit.answered = True
                assert limiter.limit == limit + 1
            callers.crowd(100, ALICE, 1.0)
            await wait_all_tasks_blocked()
            assert limiter.in_flight <= 12
            for _ in range(20):
                limiter.note_busy(trio.current_time(), 3)
                await trio.sleep(0.01)
            assert limiter.limit == 1
            await trio.sleep(200)
            assert (limiter.in_flight, limiter.waiting) == (0, 0), "all are sent, one by one"

    run(main)


def test_with_a_limit_of_one_a_late_request_is_displaced() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            limiter = ConcurrencyLimiter(1, 1, lambda: 0.5)
            callers = Callers(limiter, nursery)
            callers.crowd(2, ALICE)
            await wait_all_tasks_blocked()
            for _ in range(2):
                await trio.sleep(1)
                limiter.note_busy(trio.current_time(), 3)
            assert limiter.limit == 1
            assert await callers.request(BOB, 0.1) <= 0.6
            nursery.cancel_scope.cancel()

    run(main)


def test_a_cancelled_waiter_takes_no_permit() -> None:
    async def main() -> None:
        limiter = ConcurrencyLimiter(4, 0, lambda: 100.0)
        running = most = 0

        async def work() -> None:
            nonlocal running, most
            async with limiter.permit():
                running += 1
                most = max(most, running)
                await trio.sleep(1)
                running -= 1

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(work)
            await wait_all_tasks_blocked()
            with trio.move_on_after(0.5) as scope:
                await work()
            assert scope.cancelled_caught
        assert (most, limiter.in_flight, limiter.waiting) == (3, 0, 0)

    run(main)


def test_another_waiter_watches_the_clock_if_the_first_one_leaves() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            limiter = ConcurrencyLimiter(4, 4, lambda: 0.5)
            callers = Callers(limiter, nursery)
            callers.crowd(3, ALICE)
            await wait_all_tasks_blocked()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as first:
                    first.start_soon(callers.request, ALICE, 1.0)
                    await wait_all_tasks_blocked()
                    callers.crowd(1, ALICE, 1.0)
                    await wait_all_tasks_blocked()
                    assert (limiter.in_flight, limiter.waiting) == (3, 2)
                    scope.cancel()
            await trio.sleep(0.1)
            assert (limiter.in_flight, limiter.waiting) == (4, 0)
            nursery.cancel_scope.cancel()

    run(main)


@pytest.mark.parametrize("seed", range(int(os.environ.get("IPFSFUSE_FUZZ", "5"))))
def test_limits_hold_and_every_request_ends_with_random_callers(seed: int) -> None:
    chance = random.Random(seed)
    running, late = chance.randrange(1, 20), chance.randrange(1, 40)
    late_after = chance.choice([0.01, 0.3, 2.0])
    ended = 0

    async def main() -> None:
        limiter = ConcurrencyLimiter(running, late, lambda: late_after)
        inside: set[Permit] = set()

        async def requests(caller: Caller) -> None:
            nonlocal ended
            retried = False
            await trio.sleep(chance.uniform(0, 10))
            with request_of(caller), trio.move_on_after(chance.choice([0.01, 1, 10, 100])):
                for _ in range(chance.randrange(1, 10)):
                    async with limiter.permit(retried) as permit:
                        inside.add(permit)
                        assert limiter.in_flight <= running + late
                        try:
                            await trio.sleep(chance.choice([0, 0.001, 0.1, 1, 5]))
                            if chance.random() < 0.3:
                                limiter.note_busy(permit.since, chance.randrange(4))
                            else:
                                permit.answered = True
                        finally:
                            inside.discard(permit)
                        continue
                    retried = True
            ended += 1

        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(requests, chance.choice([ALICE, BOB, None]))
        assert (ended, limiter.in_flight, limiter.waiting, len(inside)) == (200, 0, 0, 0)

    run(main)
