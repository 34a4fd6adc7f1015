"""The garbage collector holds the event loop for a moment only, however many objects are alive."""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ipfsfuse.process import short_collections

MOST = 0.05
"""Seconds of CPU time. Objects are frozen if a pass takes over 10 ms, so a pass takes about half of this."""


@dataclass(slots=True)
class Held:
    key: tuple[int, bytes]


@pytest.fixture
def passes() -> Iterator[list[float]]:
    """The seconds of each pass."""
    took, began = list[float](), 0.0

    def note(phase: str, _info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.thread_time()
        else:
            took.append(time.thread_time() - began)

    gc.collect()
    gc.freeze()  # objects that other tests left
    gc.callbacks.append(note)
    yield took
    gc.callbacks.remove(note)
    gc.unfreeze()


def test_collector_passes_do_not_grow_with_the_number_of_live_objects(passes: list[float]) -> None:
    with short_collections():
        table = {number: Held((number, b"%d" % number)) for number in range(1_000_000)}
    assert len(passes) > 100
    assert max(passes) < MOST
    assert gc.get_freeze_count() > len(table) // 2


def test_a_small_heap_is_never_frozen(passes: list[float]) -> None:
    """Cycles in frozen objects would stay for good."""
    before = gc.get_freeze_count()
    with short_collections():
        for _ in range(20):
            made = [Held((number, b"")) for number in range(2_000)]
            gc.collect()
            del made
    assert gc.get_freeze_count() <= before
