"""Inode numbers: one for all paths of a file, one for each path of a directory, and never two alike."""

import hashlib
import stat

import pytest

from ipfsfuse.dag.cid import DAG_PB, RAW, Cid, canonical, make
from ipfsfuse.fuse.inodes import ROOT_INODE, Inodes
from ipfsfuse.vfs.tree import ROOT_ATTRIBUTES, Attributes

FILE = Attributes(stat.S_IFREG | 0o444, 10, 0)
DIRECTORY = ROOT_ATTRIBUTES
KEY = bytes(range(32))


def cid_of(text: str, codec: int = RAW) -> Cid:
    return make(codec, b"\x12\x20" + hashlib.sha256(text.encode()).digest())


def test_a_file_has_one_inode_for_all_spellings_and_its_number_comes_from_the_cid() -> None:
    table, again = Inodes(KEY), Inodes(KEY)
    v0 = Cid(b"\x12\x20" + hashlib.sha256(b"x").digest())
    assert table.file(v0, FILE) is table.file(canonical(v0), FILE)
    assert (
        table.file(v0, FILE).number
        == again.file(canonical(v0), FILE).number
        == again.likely(ROOT_INODE, b"x", v0)
    )
    assert Inodes(bytes(32)).file(v0, FILE).number != table.file(v0, FILE).number, (
        "another key gives other numbers"
    )


def test_a_raw_view_of_a_dag_pb_block_is_another_file() -> None:
    table = Inodes(KEY)
    assert table.file(cid_of("x"), FILE).number != table.file(cid_of("x", DAG_PB), FILE).number


def test_a_directory_has_one_inode_for_each_path_with_the_same_number_in_every_table() -> None:
    def numbers() -> list[int]:
        table = Inodes(KEY)
        a = table.directory(ROOT_INODE, b"a", cid_of("d", DAG_PB), DIRECTORY)
        a.lookups = 1
        b = table.directory(ROOT_INODE, b"b", cid_of("d", DAG_PB), DIRECTORY)
        below = table.directory(a.number, b"b", cid_of("d", DAG_PB), DIRECTORY)
        assert below.parent == a.number
        assert table.directory(ROOT_INODE, b"a", cid_of("d", DAG_PB), DIRECTORY) is a
        return [a.number, b.number, below.number]

    assert numbers() == numbers()
    assert len(set(numbers())) == 3


def test_a_number_that_is_held_is_never_given_to_another_cid() -> None:
    """With 9 bits for 400 inodes nearly every new one meets a number that is held."""
    table = Inodes(KEY, bits=9)
    held = {}
    for number in range(400):
        cid = cid_of(str(number), DAG_PB if number % 3 else RAW)
        inode = (
            table.directory(ROOT_INODE, str(number).encode(), cid, DIRECTORY)
            if number % 3 == 1
            else table.file(cid, FILE)
        )
        table.refer(inode)
        assert ROOT_INODE < inode.number < 1 << 9
        assert inode.number not in held
        held[inode.number] = inode
    for number, inode in held.items():
        assert table.get(number) is inode
        assert table.forget(number, 1) is inode


def test_numbers_leave_the_highest_bit_free() -> None:
    table = Inodes(KEY)
    numbers = [table.file(cid_of(str(number)), FILE).number for number in range(2000)]
    assert 1 << 62 < max(numbers) < 1 << 63


def test_the_table_drops_an_inode_with_its_last_reference() -> None:
    table = Inodes(KEY)
    for _ in range(2):
        for number in range(1000):
            table.refer(table.file(cid_of(str(number)), FILE))
    numbers = [table.file(cid_of(str(number)), FILE).number for number in range(1000)]
    for number in numbers:
        assert table.forget(number, 1) is None
    assert len(table) == 1001
    for number in numbers:
        assert table.forget(number, 1) is not None
    assert len(table) == 1
    table.forget(ROOT_INODE, 10)
    assert table.get(ROOT_INODE).cid == b""


@pytest.mark.logs("forgets inode")
def test_forgetting_more_than_is_held_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    table = Inodes(KEY)
    inode = table.file(cid_of("x"), FILE)
    table.refer(inode)
    assert table.forget(inode.number, 2) is inode
    assert table.forget(inode.number, 1) is None
    assert len(caplog.records) == 2


def test_a_claimed_size_gives_way_to_the_true_size_for_good() -> None:
    table = Inodes(KEY)
    assert table.file(cid_of("x"), FILE._replace(size=99, exact=False)).attributes.size == 99
    assert table.file(cid_of("x"), FILE).attributes.size == 10
    assert table.file(cid_of("x"), FILE._replace(size=99, exact=False)).attributes.size == 10
