"""Listings: order, cookies, resuming, and what is left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.dag import directory_pages, hamt, path
from ipfsfuse.dag.cid import RAW
from ipfsfuse.dag.dagpb import Link
from ipfsfuse.dag.directory_pages import DirectoryEntry, Page
from tests.dag.blocks import Blocks, cid_of, fixtures, shard
from tests.dag.reading import directory, names, pages

A, B = cid_of(b"a", RAW), cid_of(b"b", RAW)


def test_a_basic_directory_is_listed_in_the_order_stored() -> None:
    heap = Blocks()
    here = directory(heap, heap.directory([Link(A, b"z", 1), Link(B, b"a", 2**64 - 1)]))
    assert heap.drive(directory_pages.entries(here, 0)) == Page(
        [DirectoryEntry(b"z", A, 1, 1), DirectoryEntry(b"a", B, 2**64 - 1, 2)], True
    )
    assert heap.drive(directory_pages.entries(here, 1)) == Page([DirectoryEntry(b"a", B, 2**64 - 1, 2)], True)
    for after in (2, 3, 2**63 - 1):
        assert heap.drive(directory_pages.entries(here, after)) == Page([], True)
    assert heap.asked == []


def test_an_empty_directory_is_one_empty_page() -> None:
    heap = Blocks()
    for root in (heap.directory([]), heap.put(shard(256, [], []))):
        assert heap.drive(directory_pages.entries(directory(heap, root), 0)) == Page([], True)


def test_names_that_no_file_system_can_hold_are_counted_and_left_out() -> None:
    heap = Blocks()
    bad = [b"", b".", b"..", b"a/b", b"a\0", b"x" * 256]
    links = [
        Link(A, name, 1)
        for name in [
            b"first",
            *bad,
            b"first",
            *(b".." for _ in range(2 * directory_pages.PAGE_ENTRIES)),
            b"last",
            b"",
        ]
    ]
    found = pages(heap, directory(heap, heap.directory(links)))
    assert names(found) == [b"first", b"last"]
    assert sum(page.skipped for page in found) == len(links) - 2
    assert len(found) == 2 + (0 if found[-1].entries else 1)


def test_a_large_directory_comes_in_pages() -> None:
    heap = Blocks()
    links = [Link(A, b"%05d" % number, 1) for number in range(2 * directory_pages.PAGE_ENTRIES + 1)]
    found = pages(heap, directory(heap, heap.directory(links)))
    assert [len(page.entries) for page in found] == [
        directory_pages.PAGE_ENTRIES,
        directory_pages.PAGE_ENTRIES,
        1,
    ]
    assert names(found) == [link.name for link in links]


@pytest.mark.parametrize("width", [8, 64, 256, 1024])
def test_a_hamt_is_listed_in_trie_order_and_resumes_at_every_cookie(width: int) -> None:
    heap = Blocks()
    wanted = sorted((b"name %d" % number for number in range(600)), key=hamt.hash64)
    here = directory(heap, heap.trie(wanted, width))
    found = pages(heap, here)
    assert names(found) == wanted
    all_entries = [entry for page in found for entry in page.entries]
    for at in range(0, len(all_entries), 37):
        rest = pages(heap, here, all_entries[at].cookie)
        assert [entry for page in rest for entry in page.entries] == all_entries[at + 1 :]
        between = pages(heap, here, all_entries[at].cookie - 1)
        assert between[0].entries[0] == all_entries[at]
    assert pages(heap, here, 2**63 - 1)[0].entries == []


@given(
    st.lists(st.binary(min_size=1, max_size=6), max_size=80, unique=True),
    st.sampled_from([8, 32, 256]),
    st.integers(0, 2**63 - 1),
)
def test_a_hamt_lists_each_name_once_from_any_cookie(wanted: list[bytes], width: int, after: int) -> None:
    heap = Blocks()
    here = directory(heap, heap.trie(wanted, width))
    held = sorted((name for name in wanted if path.can_hold(name)), key=hamt.hash64)
    assert names(pages(heap, here)) == held
    assert names(pages(heap, here, after)) == [name for name in held if hamt.hash64(name) >> 1 > after]


def test_a_listing_of_a_large_hamt_takes_few_round_trips_and_fetches_few_nodes_twice() -> None:
    heap = Blocks()
    wanted = [b"%06d.jpg" % number for number in range(30_000)]
    here = directory(heap, heap.trie(wanted))
    nodes_below = len(heap.by_hash) - 2
    found = pages(heap, here)
    assert sorted(names(found)) == wanted
    assert all(len(batch) <= directory_pages.MAX_PARALLEL_NODES for batch in heap.asked)
    assert len(found) <= 15
    assert len(heap.asked) <= 4 * len(found) + len(heap.fetched) // directory_pages.MAX_PARALLEL_NODES
    assert len(heap.fetched) <= 1.1 * nodes_below


def test_a_listing_of_a_deep_hamt_fetches_few_nodes_twice() -> None:
    """The trie is 16 wide, so its upper levels hold only nodes. These are opened a few at a time."""
    heap = Blocks()
    wanted = [b"%06d.jpg" % number for number in range(20_000)]
    here = directory(heap, heap.trie(wanted, 16))
    assert sorted(names(pages(heap, here))) == wanted
    assert len(heap.fetched) <= 1.25 * len(heap.by_hash)


def test_names_whose_hashes_agree_in_63_bits_have_one_cookie() -> None:
    """Such a pair can't be found by trying, so the rule is tested with entries made by hand."""
    pair = [DirectoryEntry(b"a", A, 1, 5), DirectoryEntry(b"b", A, 1, 5), DirectoryEntry(b"c", A, 1, 6)]
    assert [entry.name for entry in directory_pages._distinct(pair)] == [b"a", b"", b"c"]


def test_a_hamt_of_go_unixfs_lists_its_thousand_names() -> None:
    (path,) = fixtures("gateway-conformance/*hamt*.car")
    heap = Blocks()
    here = directory(heap, heap.load_car(path)[0])
    found = names(pages(heap, here))
    assert sorted(found) == sorted(b"%d.txt" % number for number in range(1, 1001))
    assert found == sorted(found, key=hamt.hash64)
