"""Policies by themselves: the health of a source, the budget for hedging, the limits on bytes of bodies."""

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


def test_three_failures_in_a_row_start_a_pause_and_further_ones_double_it() -> None:
    source = health()
    source.record_failure(0, "reset", "x")
    source.record_success(0.1, 1)
    for _ in range(2):
        source.record_failure(0, "reset", "x")
        assert source.wait(0) == 0
    pauses = []
    now = 0.0
    for _ in range(12):
        source.record_failure(now, "reset", "x")
        pauses.append(source.wait(now))
        now += pauses[-1]
    assert 0.25 <= pauses[0] <= 0.5
    assert 0.5 <= pauses[1] <= 1
    assert LONGEST_OPEN_SECONDS / 2 <= pauses[-1] <= LONGEST_OPEN_SECONDS
    assert len(set(pauses)) == len(pauses)


def test_after_a_pause_one_request_probes_the_source() -> None:
    source = health()
    for _ in range(3):
        source.record_failure(0, "reset", "x")
    assert (source.state(0), source.state(1)) == ("open", "half_open")
    source.asked(1)
    assert source.wait(1) > 0
    source.record_cancelled()
    assert source.wait(1) == 0
    source.asked(1)
    source.record_miss()
    assert (source.wait(1), source.state(1)) == (0, "good")


def test_a_stalled_probe_does_not_delay_the_next_one_for_long() -> None:
    source = health()
    for _ in range(3):
        source.record_failure(0, "reset", "x")
    source.asked(1)
    assert 0 < source.wait(1) <= LONGEST_PROBE
    assert source.wait(1 + LONGEST_PROBE) == 0


def test_a_requested_pause_is_limited_and_an_invalid_one_is_ignored() -> None:
    longest = LONGEST_RETRY_AFTER
    for asked, paused in ((5.0, 5.0), (1e300, longest), (math.inf, longest), (math.nan, 0.0), (-1.0, 0.0)):
        source = health()
        source.record_failure(0, "busy", "x", asked)
        assert source.wait(0) == paused
    source.record_failure(0, "busy", "x", 100)
    assert (source.wait(0), source.wait(0, 3), source.wait(2, 3), source.wait(3, 3)) == (100, 3, 1, 0)


def test_pauses_of_sources_go_on_while_the_machine_sleeps() -> None:
    source = health()
    source.record_failure(0, "busy", "x", 500)
    assert source.record_wrong(0, others=True) == 600
    source.slept(450)
    assert (source.wait(0), source.is_quarantined(149), source.is_quarantined(150)) == (50, True, False)


def test_a_source_is_quarantined_for_10_then_20_minutes_if_others_are_left() -> None:
    source = health()
    assert source.record_wrong(0, others=False) is None
    assert source.record_wrong(0, others=True) == 600
    assert source.record_wrong(1, others=True) == 0  # this request was made before: nothing doubles
    assert (source.is_quarantined(599), source.is_quarantined(600)) == (True, False)
    assert source.record_wrong(600, others=True) == 1200
    assert health(may_quarantine=False).record_wrong(0, others=True) is None


def test_percentiles_are_of_the_last_answers() -> None:
    source = health()
    assert source.slow_after() == 0.5
    source.record_success(0.8, 10)
    assert source.slow_after() == 0.8, "with few answers, the time of the slowest"
    for index in range(1000):
        source.record_success(index / 1000, 10)
    assert source.percentile(0.5) == pytest.approx(0.87, abs=0.02)
    assert source.percentile(0.95) == pytest.approx(0.98, abs=0.02)
    assert (source.blocks, source.bytes) == (1001, 10_010)
    for _ in range(256):
        source.record_success(0.001, 1)
    assert source.slow_after() == 0.01


def test_hedges_are_one_request_in_twenty() -> None:
    budget = HedgeBudget()
    spent = 0
    for _ in range(1000):
        budget.request()
        spent += budget.spend()
    assert spent <= 51


def test_bodies_stay_within_the_budget_and_a_body_larger_than_it_passes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BodyShare, "GUARANTEED", 0)

    async def main() -> None:
        budget = BodyBudget(100)
        share = BodyShare(budget)
        most = 0

        async def read(size: int) -> None:
            nonlocal most
            await share.take(size)
            most = max(most, budget.used)
            assert budget.used <= 100 or budget.used == size
            await trio.sleep(0.01)
            share.give(size)

        async with trio.open_nursery() as nursery:
            for size in [60, 30, 30, 150, 100, 1, 99] * 5:
                nursery.start_soon(read, size)
        assert (budget.used, most) == (0, 150)

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_one_budget_limits_all_sources_and_each_keeps_its_own_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BodyShare, "GUARANTEED", 20)

    async def main() -> None:
        budget = BodyBudget(100)
        stalled, healthy = BodyShare(budget), BodyShare(budget)
        async with trio.open_nursery() as nursery:
            for _ in range(30):  # never given back
                nursery.start_soon(stalled.take, 10)
            await wait_all_tasks_blocked()
            assert budget.used == stalled.used == 100
            for _ in range(50):
                with trio.fail_after(1):
                    await healthy.take(10)
                    await healthy.take(10)
                with trio.move_on_after(1) as scope:
                    await healthy.take(10)
                assert scope.cancelled_caught  # beyond its own share, the limit for all sources holds
                assert budget.used == 120
                healthy.give(20)
            stalled.give(100)
            await wait_all_tasks_blocked()
            assert budget.used == 100
            nursery.cancel_scope.cancel()
        assert healthy.used == 0

    trio.run(main, clock=MockClock(autojump_threshold=0))
