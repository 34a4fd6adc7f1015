"""The planner of pin batches, tested with a model of a node that does what each round says."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ipfsfuse.cache.pins.batches import MAX_MEMBERS, BatchPlanner, PinBatch, directory, members_of
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, nodes, unixfs
from ipfsfuse.dag.cid import Cid


def cid(index: int) -> Cid:
    return cids.make(cids.RAW, b"\x12\x20" + index.to_bytes(32, "big"))


class PlannerMachine(RuleBasedStateMachine):
    """Random additions and removals between rounds and during them. A round may fail with any part of it
    done, and the node may lose batches."""

    MAX_MEMBERS = 8
    MAX_PER_ROUND = 2

    def __init__(self) -> None:
        super().__init__()
        self.planner = BatchPlanner(self.MAX_MEMBERS, self.MAX_PER_ROUND)
        self.wanted: set[Cid] = set()
        self.node: dict[int, tuple[Cid, ...]] = {}
        self.round_open = False
        self.twice = False  # whether something may stay linked twice

    @rule(index=st.integers(0, 40))
    def add(self, index: int) -> None:
        assert self.planner.add(cid(index)) == (cid(index) not in self.wanted)
        self.wanted.add(cid(index))

    @rule(index=st.integers(0, 40))
    def remove(self, index: int) -> None:
        assert self.planner.remove(cid(index)) == (cid(index) in self.wanted)
        self.wanted.discard(cid(index))

    @rule(first=st.integers(0, 40), count=st.integers(1, 30), add=st.booleans())
    def many(self, first: int, count: int, add: bool) -> None:
        for index in range(first, first + count):
            (self.add if add else self.remove)(index)

    @precondition(lambda self: not self.round_open)
    @rule()
    def begin(self) -> None:
        self.round = self.planner.begin()
        self.round_open = True
        for batch in self.round.writes:
            assert batch.number not in self.node
            assert 0 < len(batch.members) <= self.MAX_MEMBERS
            assert len(set(batch.members)) == len(batch.members)
        assert set(self.round.drops) <= set(self.node)

    @precondition(lambda self: self.round_open)
    @rule()
    def finish(self) -> None:
        self.node |= {batch.number: batch.members for batch in self.round.writes}
        for number in self.round.drops:
            del self.node[number]
        self.planner.finish()
        self.round_open = False
        assert self.planner.batches == self.node

    @precondition(lambda self: self.round_open)
    @rule(done=st.integers(0, 3), lost=st.sets(st.integers(0, 60)))
    def fail(self, done: int, lost: set[int]) -> None:
        """The node did a part of the round and failed. When it came back, it had lost some batches. Then we
        ask what it has."""
        self.planner.abandon()
        self.round_open = False
        for batch in self.round.writes[:done]:
            self.node[batch.number] = batch.members
        self.twice |= done > 0  # until the next round, more of a batch that it was to drop may be wanted
        self.node = {number: members for number, members in self.node.items() if number not in lost}
        for number in self.planner.batches.keys() - self.node.keys():
            self.planner.lose(number)
        for number in sorted(self.node.keys() - self.planner.batches.keys()):
            self.planner.adopt(PinBatch(number, self.node[number]))
        assert self.planner.batches == self.node

    @precondition(lambda self: not self.round_open)
    @rule()
    def restart(self) -> None:
        """A new process knows what is wanted, and reads back what the node has. Meanwhile, more may be
        wanted."""
        self.planner = BatchPlanner(self.MAX_MEMBERS, self.MAX_PER_ROUND)
        for key in self.wanted:
            self.planner.add(key)
        for number, members in self.node.items():
            self.planner.adopt(PinBatch(number, members))

    @precondition(lambda self: not self.round_open)
    @rule(index=st.integers(0, 40), count=st.integers(1, 8))
    def edit(self, index: int, count: int) -> None:
        """A user puts a batch among ours, and we find it."""
        batch = PinBatch(
            max(self.node, default=0) + 5, tuple(cid(number) for number in range(index, index + count))
        )
        self.node[batch.number] = batch.members
        self.planner.adopt(batch)
        self.twice = True

    @invariant()
    def knows_what_is_wanted(self) -> None:
        assert {key for key in map(cid, range(80)) if self.planner.home(key) is not None} == self.wanted
        assert len(self.planner) == len(self.wanted)
        if not self.round_open:
            for key in self.wanted:
                number = self.planner.home(key)
                assert number is not None
                assert number == 0 or key in self.node[number]
            assert self.planner.queued == sum(self.planner.home(key) == 0 for key in self.wanted)

    def teardown(self) -> None:
        """Without further changes it settles: everything that is wanted is held, and there are at most twice
        as many links."""
        if self.round_open:
            self.finish()
        while self.planner.begin():
            self.round, self.round_open = self.planner._round, True
            self.finish()
        held = [key for members in self.node.values() for key in members]
        assert len(set(held)) == len(held) or self.twice
        assert set(held) >= self.wanted
        assert len(held) <= 2 * len(self.wanted)


TestPlanner = PlannerMachine.TestCase
TestPlanner.settings = settings(max_examples=80, stateful_step_count=40)


def test_a_batch_that_was_about_to_be_dropped_stays_if_half_of_it_is_wanted_again() -> None:
    """A process that knows little of what is staged is killed between its write and its drop."""
    first = BatchPlanner(limit=16)
    first.adopt(PinBatch(1, tuple(map(cid, range(10)))))
    for index in range(3):
        first.add(cid(index))
    (written,), drops = first.begin()
    assert (set(written.members), drops) == (set(map(cid, range(3))), (1,))
    second = BatchPlanner(limit=16)
    for index in range(10):
        second.add(cid(index))
    for batch in (PinBatch(1, tuple(map(cid, range(10)))), written):
        second.adopt(batch)
    assert not second.begin(), "ten are wanted, and thirteen are linked"
    for index in range(3):
        second.remove(cid(index))
    assert second.begin() == ((), (2,)), "unwanted members stay in a batch while half of it is wanted"
    second.finish()
    for index in range(3, 6):
        second.remove(cid(index))
    (left,), drops = second.begin()
    assert (set(left.members), drops) == (set(map(cid, range(6, 10))), (1,))


@given(st.lists(st.integers(1, 30), max_size=60), st.sets(st.integers(0, 900)))
def test_batches_stay_few(sizes: list[int], evicted: set[int]) -> None:
    planner = BatchPlanner(limit=16)
    written = total = 0
    for size in sizes:
        for index in range(total, total + size):
            planner.add(cid(index))
            if index in evicted:
                planner.remove(cid(index // 2))
        total += size
        written += sum(len(batch.members) for batch in planner.begin().writes)
        planner.finish()
    planner.begin()
    planner.finish()
    assert len(planner.batches) <= 6 * len(planner) / 16 + math.log2(16) + 2
    assert written <= total * (1 + math.log(16, 1.5))


def test_pins_that_are_added_one_at_a_time_cost_few_batches_and_writes() -> None:
    planner = BatchPlanner()
    written = 0
    for index in range(3000):
        planner.add(cid(index))
        written += sum(len(batch.members) for batch in planner.begin().writes)
        planner.finish()
    assert len(planner.batches) <= 14
    assert written <= 3000 * 17


def test_ten_thousand_pins_at_once_make_ten_batches() -> None:
    planner = BatchPlanner()
    for index in range(10_000):
        planner.add(cid(index))
    assert [len(batch.members) for batch in planner.begin().writes] == [MAX_MEMBERS] * 10


def test_a_pin_after_an_eviction_needs_no_write() -> None:
    planner = BatchPlanner()
    for index in range(10):
        planner.add(cid(index))
    planner.begin()
    planner.finish()
    planner.remove(cid(3))
    planner.add(cid(3))
    assert not planner.begin()


def test_a_round_that_failed_before_its_drops_is_not_written_again() -> None:
    """After a kill, the node has the new batch and the old one, of which a third is still wanted."""
    planner = BatchPlanner()
    for index in range(4, 12):
        planner.add(cid(index))
    planner.adopt(PinBatch(1, tuple(map(cid, range(6)))))
    planner.adopt(PinBatch(2, tuple(map(cid, range(4, 12)))))
    assert planner.begin() == ((), (1,))


def test_a_batch_is_a_directory_that_links_its_members() -> None:
    members = [cid(index) for index in range(MAX_MEMBERS)]
    block = directory(members)
    assert len(block) < 64 * 1024
    node = nodes.parse(cids.make(cids.DAG_PB, b"\x12\x20" + bytes(32)), block)
    assert isinstance(node, nodes.Directory)
    assert [link.cid for link in node.links] == members
    assert [link.name for link in node.links] == sorted(link.name for link in node.links)
    assert members_of(block) == tuple(members)


def test_only_a_block_exactly_as_we_write_it_is_read_as_a_batch() -> None:
    members = [cid(index) for index in range(3)]
    links = [dagpb.Link(member, b"%03d" % index, 0) for index, member in enumerate(members)]
    folder = unixfs.encode(unixfs.UnixFS(unixfs.Type.DIRECTORY))
    assert members_of(dagpb.encode(links, folder)) == tuple(members)
    others = {
        "not dag-pb": b"\xff\x00",
        "no data": dagpb.encode(links, None),
        "a file": dagpb.encode(links, unixfs.encode(unixfs.UnixFS(unixfs.Type.FILE))),
        "other names": dagpb.encode([links[0]._replace(name=b"a")], folder),
        "a size": dagpb.encode([links[0]._replace(tsize=1)], folder),
        "one member twice": directory([members[0], members[0]]),
        "an inline member": directory([cids.make(cids.RAW, b"\x00\x01a")]),
        "version 0": directory([cids.Cid(b"\x12\x20" + bytes(32))]),
        "too many": directory([cid(index) for index in range(MAX_MEMBERS + 1)]),
    }
    assert {name: members_of(block) for name, block in others.items()} == dict.fromkeys(others)
