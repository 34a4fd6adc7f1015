"""Inode numbers: one for a file however it is reached, one for each path of a directory, none given twice."""

import hashlib

from ipfsfuse.dag.cid import DAG_PB, RAW, Cid, canonical, make
from ipfsfuse.fuse.inodes import ROOT, Inodes, likely
from ipfsfuse.vfs import attributes

FILE = attributes.claimed(10)._replace(exact=True)
DIRECTORY = attributes.ROOT


def cid_of(text: str, codec: int = RAW) -> Cid:
    return make(codec, b"\x12\x20" + hashlib.sha256(text.encode()).digest())


def colliding(cid: Cid) -> Cid:
    """Another CID whose number would be the same."""
    return make(RAW, b"\x12\x20" + b"\xff" * 24 + cid[-8:])


def test_a_file_has_one_inode_for_all_spellings_and_its_number_comes_from_the_cid() -> None:
    table, again = Inodes(attributes.ROOT), Inodes(attributes.ROOT)
    v0 = Cid(b"\x12\x20" + hashlib.sha256(b"x").digest())
    assert table.file(v0, FILE) is table.file(canonical(v0), FILE)
    assert table.file(v0, FILE).number == again.file(canonical(v0), FILE).number == likely(v0)


def test_a_raw_view_of_a_dag_pb_block_is_another_file() -> None:
    table = Inodes(attributes.ROOT)
    assert table.file(cid_of("x"), FILE).number != table.file(cid_of("x", DAG_PB), FILE).number


def test_a_directory_has_one_inode_for_each_path_stable_over_tables() -> None:
    def numbers() -> list[int]:
        table = Inodes(attributes.ROOT)
        a = table.directory(ROOT, b"a", cid_of("d", DAG_PB), DIRECTORY)
        a.lookups = 1
        b = table.directory(ROOT, b"b", cid_of("d", DAG_PB), DIRECTORY)
        below = table.directory(a.number, b"b", cid_of("d", DAG_PB), DIRECTORY)
        assert below.parent == a.number
        assert table.directory(ROOT, b"a", cid_of("d", DAG_PB), DIRECTORY) is a
        return [a.number, b.number, below.number]

    assert numbers() == numbers()
    assert len(set(numbers())) == 3


def test_a_number_that_is_held_is_never_given_to_another_cid() -> None:
    table = Inodes(attributes.ROOT)
    first, second = table.file(cid_of("x"), FILE), table.file(colliding(cid_of("x")), FILE)
    assert second.number == first.number + 1
    first.lookups = second.lookups = 1
    table.forget(first.number, 1)
    assert table.get(second.number) is second
    assert table.file(cid_of("x"), FILE).number == likely(cid_of("x"))


def test_a_number_with_pages_on_their_way_is_not_given_to_another_cid() -> None:
    waiting = {likely(cid_of("x"))}
    table = Inodes(attributes.ROOT, waiting.__contains__)
    assert table.file(colliding(cid_of("x")), FILE).number == likely(cid_of("x")) + 1


def test_the_table_holds_nothing_that_the_kernel_gave_back() -> None:
    table = Inodes(attributes.ROOT)
    for number in range(1000):
        table.file(cid_of(str(number)), FILE).lookups += 2
    for number in range(1000):
        table.forget(likely(cid_of(str(number))), 1)
    assert len(table) == 1001
    for number in range(1000):
        table.forget(likely(cid_of(str(number))), 1)
    assert len(table) == 1
    table.forget(ROOT, 10)
    assert table.get(ROOT).cid == b""


def test_a_claimed_size_gives_way_to_the_true_one_and_never_back() -> None:
    table = Inodes(attributes.ROOT)
    assert table.file(cid_of("x"), attributes.claimed(99)).attributes.size == 99
    assert table.file(cid_of("x"), FILE).attributes.size == 10
    assert table.file(cid_of("x"), attributes.claimed(99)).attributes.size == 10
