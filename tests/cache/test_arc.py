"""ARC by bytes, compared with a model that follows the paper."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ipfsfuse.cache.arc import ALL, NO_OWNER, Arc
from scripts.benches.arc import ArcPolicy, Lru, rates, traces

CAPACITY = 100


class Model:
    """The four lists of the paper as plain lists of (key, size), the last used at the end. Every sum is
    computed anew."""

    def __init__(self, capacity: int) -> None:
        self.c = capacity
        self.p = 0
        self.t1: list[tuple[str, int]] = []
        self.t2: list[tuple[str, int]] = []
        self.b1: list[tuple[str, int]] = []
        self.b2: list[tuple[str, int]] = []

    def find(
        self, key: str, *lists: list[tuple[str, int]]
    ) -> tuple[list[tuple[str, int]], tuple[str, int]] | None:
        return next(((part, item) for part in lists for item in part if item[0] == key), None)

    def use(self, key: str) -> None:
        found = self.find(key, self.t1, self.t2)
        if found:
            found[0].remove(found[1])
            self.t2.append(found[1])

    def refresh(self, key: str) -> None:
        found = self.find(key, self.t1, self.t2)
        if found:
            found[0].remove(found[1])
            found[0].append(found[1])

    def remove(self, key: str) -> None:
        found = self.find(key, self.t1, self.t2)
        if found:
            found[0].remove(found[1])

    def admit(self, key: str, size: int) -> list[str]:
        in_b2 = self.find(key, self.b2) is not None
        held = self.find(key, self.t1, self.t2)
        ghost = self.find(key, self.b1, self.b2)
        if ghost:
            weight = ghost[1][1]
            one, two = total(self.b1), total(self.b2)
            if in_b2:
                self.p = max(0, self.p - max(weight, weight * one // max(1, two)))
            else:
                self.p = min(self.c, self.p + max(weight, weight * two // max(1, one)))
            ghost[0].remove(ghost[1])
        home = held[0] if held else self.t2 if ghost else self.t1
        evicted = []
        while total(self.t1) + total(self.t2) + size > self.c:
            evicted.append(self.replace(key, in_b2))
        own = self.find(key, self.t1, self.t2)
        if own:
            own[0].remove(own[1])
        home.append((key, size + (own[1][1] if own else 0)))
        self.forget()
        return evicted

    def replace(self, key: str, in_b2: bool) -> str:
        others1 = [item for item in self.t1 if item[0] != key]
        others2 = [item for item in self.t2 if item[0] != key]
        own = sum(size for name, size in self.t1 + self.t2 if name == key)
        over = total(self.t1) > self.p or (in_b2 and total(self.t1) >= self.p)
        if others1 and (over or not others2):
            victim, source, ghosts = others1[0], self.t1, self.b1
        elif others2 and 2 * own <= self.c:
            victim, source, ghosts = others2[0], self.t2, self.b2
        else:
            self.remove(key)
            return key
        source.remove(victim)
        ghosts.append(victim)
        return victim[0]

    def forget(self) -> None:
        while self.b1 and total(self.t1) + total(self.b1) > self.c:
            self.b1.pop(0)
        while self.b2 and sum(map(total, (self.t1, self.t2, self.b1, self.b2))) > 2 * self.c:
            self.b2.pop(0)


def ghosts(arc: Arc[str]) -> int:
    return len(arc._once_ghosts) + len(arc._again_ghosts)


def total(part: list[tuple[str, int]]) -> int:
    return sum(size for _key, size in part)


keys = st.sampled_from("abcdefghijklmnop")
sizes = st.integers(1, CAPACITY)
steps = st.one_of(
    st.tuples(st.just("admit"), keys, sizes),
    st.tuples(st.just("admit"), keys, st.integers(1, 20)),
    st.tuples(st.sampled_from(["use", "refresh", "remove"]), keys, st.just(0)),
)


@settings(max_examples=400)
@given(st.lists(steps, max_size=80))
def test_arc_decides_as_a_naive_model_does(trace: list[tuple[str, str, int]]) -> None:
    arc: Arc[str] = Arc(CAPACITY)
    model = Model(CAPACITY)
    for verb, key, size in trace:
        if verb == "admit":
            assert arc.admit(key, size) == model.admit(key, size)
        else:
            getattr(arc, verb)(key)
            getattr(model, verb)(key)
        assert list(arc) == [name for name, _size in model.t1 + model.t2]
        assert (arc.target, arc.bytes, ghosts(arc)) == (
            model.p,
            total(model.t1) + total(model.t2),
            len(model.b1) + len(model.b2),
        )


owners = st.sampled_from([NO_OWNER, "alice", "bob"])


class Bounds(RuleBasedStateMachine):
    """After any operations, all sums are right and within their bounds. A caller that has at most its share
    loses nothing to a caller that has more than its share."""

    def __init__(self) -> None:
        super().__init__()
        self.arc: Arc[str] = Arc(CAPACITY, max_ghosts=5)
        self.held: dict[str, int] = {}

    def drop(self, evicted: list[str]) -> None:
        for key in evicted:
            del self.held[key]

    def by_owner(self) -> dict[object, int]:
        found: dict[object, int] = {}
        for key, size in self.held.items():
            if self.arc.owner(key) is not NO_OWNER and size:
                found[self.arc.owner(key)] = found.get(self.arc.owner(key), 0) + size
        return found

    @rule(key=keys, size=st.integers(1, 30), owner=owners)
    def admit(self, key: str, size: int, owner: str | None) -> None:
        if size <= self.arc.capacity:
            before, held = {key: self.arc.owner(key) for key in self.arc}, self.by_owner()
            own = held.pop(owner, 0)
            outgrows = self.held.get(key, 0) + size > self.arc.capacity  # then it is evicted itself
            evicted = self.arc.admit(key, size, owner)
            self.drop(evicted)
            self.held[key] = self.held.get(key, 0) + size
            half = self.arc.capacity // 2
            if owner is not NO_OWNER and own + size - 30 > half and held and max(held.values()) <= half:
                assert {before[each] for each in evicted if each != key or not outgrows} <= {owner}, (
                    "a caller that has more than half evicts only its own"
                )

    @rule(key=keys, size=st.integers(0, 5))
    def correct(self, key: str, size: int) -> None:
        if size <= self.held.get(key, 0):
            self.arc.set_size(key, size)
            if key in self.held:
                self.held[key] = size

    @rule(key=keys, owner=owners)
    def use(self, key: str, owner: str | None) -> None:
        before = self.arc.owner(key)
        self.arc.use(key, owner)
        if key in self.arc:
            expected = before if owner in (NO_OWNER, before) else owner if before is NO_OWNER else ALL
            assert self.arc.owner(key) == expected

    @rule(key=keys)
    def refresh_or_remove(self, key: str) -> None:
        if len(self.held) % 2:
            self.arc.refresh(key)
        else:
            self.arc.remove(key)
            self.held.pop(key, None)

    @rule(capacity=st.integers(0, CAPACITY))
    def resize(self, capacity: int) -> None:
        self.drop(self.arc.set_capacity(capacity))

    @invariant()
    def sums(self) -> None:
        assert {key: self.arc.size(key) for key in self.arc} == self.held
        assert self.arc.bytes == sum(self.held.values()) <= self.arc.capacity
        assert 0 <= self.arc.target <= self.arc.capacity
        assert ghosts(self.arc) <= 5
        assert {owner: size for owner, size in self.arc.bytes_by_owner().items() if size} == self.by_owner()


TestBounds = Bounds.TestCase


@pytest.mark.parametrize("name", list(traces(60)))
def test_the_hit_rate_is_at_least_98_percent_of_that_of_lru(name: str) -> None:
    trace = traces(12_000)[name]
    arc, lru = rates(ArcPolicy(1 << 28), trace), rates(Lru(1 << 28), trace)
    assert arc[0] >= 0.98 * lru[0]
    if name.startswith(("zipf", "popularity")):
        assert arc[0] > lru[0]


def test_the_target_adapts_by_bytes() -> None:
    arc: Arc[str] = Arc(1000)
    arc.admit("again", 500)
    arc.use("again")
    arc.admit("big", 400)
    assert arc.admit("other", 300) == ["big"]
    assert arc.target == 0
    arc.admit("big", 400)
    assert arc.target == 400


def test_a_scan_does_not_push_out_what_is_used_again() -> None:
    arc: Arc[str] = Arc(100)
    for key in "abcd":
        arc.admit(key, 20)
        arc.use(key)
    for number in range(1000):
        arc.admit(f"scan {number}", 10)
    assert all(key in arc for key in "abcd")


def test_a_growing_file_evicts_others_until_it_holds_half_and_then_itself() -> None:
    arc: Arc[str] = Arc(100)
    for key in "abcd":
        arc.admit(key, 25)
        arc.use(key)
    evicted = [key for _ in range(11) for key in arc.admit("file", 5)]
    assert evicted == ["a", "b", "c"]
    evicted = [key for _ in range(10) for key in arc.admit("file", 5)]
    assert evicted == ["file"]
    assert "d" in arc


def test_a_sweep_of_one_caller_does_not_evict_what_another_has_read() -> None:
    arc: Arc[str] = Arc(1000)
    for number in range(40):
        arc.admit(f"alice {number}", 10, "alice")
    for number in range(1000):
        arc.admit(f"bob {number}", 10, "bob")
    assert all(f"alice {number}" in arc for number in range(40))
    assert dict(arc.bytes_by_owner()) == {"alice": 400, "bob": 600}, "bob has all the room that was free"


def test_a_caller_that_filled_the_cache_gives_half_to_the_next_caller() -> None:
    arc: Arc[str] = Arc(1000)
    for number in range(100):
        arc.admit(f"bob {number}", 10, "bob")
        arc.use(f"bob {number}", "bob")
    for number in range(1000):
        arc.admit(f"alice {number}", 10, "alice")
    assert dict(arc.bytes_by_owner()) == {"alice": 500, "bob": 500}


def test_one_caller_alone_replaces_what_an_earlier_run_left() -> None:
    arc: Arc[str] = Arc(1000)
    for number in range(100):
        arc.restore(f"before {number}", 10, False)
    for number in range(100):
        arc.admit(f"alice {number}", 10, "alice")
    assert dict(arc.bytes_by_owner()) == {"alice": 1000}


def test_entries_that_two_callers_use_are_not_evicted_for_one_of_them() -> None:
    arc: Arc[str] = Arc(1000)
    for number in range(60):
        arc.admit(f"bob {number}", 10, "bob")
    for number in range(30):
        arc.use(f"bob {number}", "alice")
    for number in range(1000):
        arc.admit(f"more {number}", 10, "bob")
    assert all(arc.owner(f"bob {number}") == ALL for number in range(30))
    assert dict(arc.bytes_by_owner()) == {ALL: 300, "bob": 700}


def test_a_file_that_grows_beyond_its_callers_share_evicts_only_itself() -> None:
    arc: Arc[str] = Arc(1000)
    for number in range(40):
        arc.admit(f"alice {number}", 10, "alice")
    evicted = [key for _ in range(300) for key in arc.admit("large", 10, "bob")]
    assert set(evicted) == {"large"}


def test_an_entry_belongs_to_the_caller_that_brought_most_of_it() -> None:
    arc: Arc[str] = Arc(1000)
    steps = [
        ("bob", 10, "bob"),
        ("alice", 5, "bob"),
        ("alice", 6, "alice"),
        ("bob", 3, "bob"),
        ("bob", 9, "bob"),
    ]
    for owner, size, winner in steps:
        arc.admit("pack", size, owner)
        assert arc.owner("pack") == winner
        assert dict(arc.bytes_by_owner()) == {winner: arc.size("pack")}
