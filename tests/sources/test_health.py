"""The policies alone: what a source's answers lead to, the budget for hedging, the bounds on bytes."""

import math
import random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ipfsfuse.sources.http.settings import BodyBudget, BodyShare
from ipfsfuse.sources.pool.health import (
    LONGEST_OPEN_SECONDS,
    LONGEST_PROBE,
    LONGEST_RETRY_AFTER,
    Health,
    HedgeBudget,
)


def health(may_quarantine: bool = True) -> Health:
    return Health(random.Random(1), may_quarantine=may_quarantine, slow=0.5)


def test_two_failures_in_a_row_are_nothing_three_are_a_pause_that_doubles() -> None:
    one = health()
    one.record_failure(0, "reset", "x")
    one.record_success(0.1, 1)
    for _ in range(2):
        one.record_failure(0, "reset", "x")
        assert one.wait(0) == 0
    pauses = []
    now = 0.0
    for _ in range(12):
        one.record_failure(now, "reset", "x")
        pauses.append(one.wait(now))
        now += pauses[-1]
    assert 0.25 <= pauses[0] <= 0.5
    assert 0.5 <= pauses[1] <= 1
    assert LONGEST_OPEN_SECONDS / 2 <= pauses[-1] <= LONGEST_OPEN_SECONDS
    assert len(set(pauses)) == len(pauses)


def test_after_a_pause_one_request_finds_out() -> None:
    one = health()
    for _ in range(3):
        one.record_failure(0, "reset", "x")
    assert (one.state(0), one.state(1)) == ("open", "half_open")
    one.asked(1)
    assert one.wait(1) > 0
    one.record_cancelled()
    assert one.wait(1) == 0
    one.asked(1)
    one.record_miss()
    assert (one.wait(1), one.state(1)) == (0, "good")


def test_a_request_that_should_find_out_and_stalls_keeps_no_other_from_it_for_long() -> None:
    one = health()
    for _ in range(3):
        one.record_failure(0, "reset", "x")
    one.asked(1)
    assert 0 < one.wait(1) <= LONGEST_PROBE
    assert one.wait(1 + LONGEST_PROBE) == 0


def test_a_pause_that_is_asked_for_is_bounded_and_what_is_no_number_is_not_heeded() -> None:
    longest = LONGEST_RETRY_AFTER
    for asked, paused in ((5.0, 5.0), (1e300, longest), (math.inf, longest), (math.nan, 0.0), (-1.0, 0.0)):
        one = health()
        one.record_failure(0, "busy", "x", asked)
        assert one.wait(0) == paused
    one.record_failure(0, "busy", "x", 100)
    assert (one.wait(0), one.wait(0, 3), one.wait(2, 3), one.wait(3, 3)) == (100, 3, 1, 0)


def test_while_the_machine_slept_the_pauses_of_sources_went_on() -> None:
    one = health()
    one.record_failure(0, "busy", "x", 500)
    assert one.record_wrong(0, others=True) == 600
    one.slept(450)
    assert (one.wait(0), one.is_quarantined(149), one.is_quarantined(150)) == (50, True, False)


def test_quarantined_for_ten_minutes_then_twenty_while_others_are_left() -> None:
    one = health()
    assert one.record_wrong(0, others=False) is None
    assert one.record_wrong(0, others=True) == 600
    assert one.record_wrong(1, others=True) == 0  # was on its way: nothing doubles
    assert (one.is_quarantined(599), one.is_quarantined(600)) == (True, False)
    assert one.record_wrong(600, others=True) == 1200
    assert health(may_quarantine=False).record_wrong(0, others=True) is None


def test_percentiles_are_of_the_last_answers() -> None:
    one = health()
    assert one.slow_after() == 0.5
    one.record_success(0.8, 10)
    assert one.slow_after() == 0.8, "with few answers, what the slowest took"
    for index in range(1000):
        one.record_success(index / 1000, 10)
    assert one.percentile(0.5) == pytest.approx(0.87, abs=0.02)
    assert one.percentile(0.95) == pytest.approx(0.98, abs=0.02)
    assert (one.blocks, one.bytes) == (1001, 10_010)
    for _ in range(256):
        one.record_success(0.001, 1)
    assert one.slow_after() == 0.01


def test_hedges_are_one_request_in_twenty() -> None:
    budget = HedgeBudget()
    spent = 0
    for _ in range(1000):
        budget.request()
        spent += budget.spend()
    assert spent <= 51


def test_room_is_never_over_its_limit_and_a_body_larger_than_all_of_it_passes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BodyShare, "GUARANTEED", 0)

    async def main() -> None:
        room = BodyBudget(100)
        share = BodyShare(room)
        most = 0

        async def read(size: int) -> None:
            nonlocal most
            await share.take(size)
            most = max(most, room.used)
            assert room.used <= 100 or room.used == size
            await trio.sleep(0.01)
            share.give(size)

        async with trio.open_nursery() as nursery:
            for size in [60, 30, 30, 150, 100, 1, 99] * 5:
                nursery.start_soon(read, size)
        assert (room.used, most) == (0, 150)

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_one_room_bounds_all_sources_and_none_takes_the_share_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BodyShare, "GUARANTEED", 20)

    async def main() -> None:
        room = BodyBudget(100)
        dripping, well = BodyShare(room), BodyShare(room)
        async with trio.open_nursery() as nursery:
            for _ in range(30):  # never given back
                nursery.start_soon(dripping.take, 10)
            await wait_all_tasks_blocked()
            assert room.used == dripping.used == 100
            for _ in range(50):
                with trio.fail_after(1):
                    await well.take(10)
                    await well.take(10)
                with trio.move_on_after(1) as scope:
                    await well.take(10)
                assert scope.cancelled_caught  # beyond its own share the bound over all holds
                assert room.used == 120
                well.give(20)
            dripping.give(100)
            await wait_all_tasks_blocked()
            assert room.used == 100
            nursery.cancel_scope.cancel()
        assert well.used == 0

    trio.run(main, clock=MockClock(autojump_threshold=0))
