"""Directories that arrive in one answer, on a real mount with a gateway that sends CARs."""

import os
from pathlib import Path

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.dagpb import Link
from ipfsfuse.vfs.prefetch import DIRECTORIES_AHEAD, MAX_CONTENTS
from tests.dag.blocks import Blocks
from tests.mounting import Home, wait_until
from tests.sources.content import tree
from tests.sources.servers import Server


def folder_of(heap: Blocks, name: str, count: int, claimed: int = 0) -> Cid:
    """A directory of `count` small files. Links claim `claimed` bytes for each (0: the true size)."""
    contents = [f"{name} {number}".encode() for number in range(count)]
    return heap.directory(
        [
            Link(heap.leaf(content), b"%03d" % number, claimed or len(content))
            for number, content in enumerate(contents)
        ]
    )


def asked_for(server: Server, scope: str) -> list[Cid]:
    return [ask.cid for ask in server.asked if ask.cid is not None and ask.query.get("dag-scope") == scope]


def asked_as_blocks(server: Server) -> set[Cid]:
    return {ask.cid for ask in server.asked if ask.cid is not None and ask.query.get("format") == "raw"}


def read_all(folder: Path, name: str, count: int) -> None:
    assert sorted(os.listdir(folder)) == [f"{number:03}" for number in range(count)]
    for number in range(count):
        assert (folder / f"{number:03}").read_text() == f"{name} {number}"


def test_a_listed_hamt_is_fetched_by_one_request_without_its_childrens_content(home: Home) -> None:
    heap = Blocks()
    names = [b"name %d" % number for number in range(3000)]
    sample = tree(heap, heap.trie(names))
    content = heap.leaf(b"")
    with Server({}, trees=(sample,)) as server, home.mounted("--from", server.url) as mount:
        assert sorted(os.listdir(mount.path / cids.text(sample.root))) == sorted(
            name.decode() for name in names
        )
        assert (asked_for(server, "entity"), asked_for(server, "all")) == ([sample.root], [])
        assert asked_as_blocks(server) <= sample.entity.keys()
        assert content not in asked_as_blocks(server)


def test_a_sequential_reader_gets_the_rest_of_its_directory_and_four_directories_ahead(
    home: Home,
) -> None:
    heap = Blocks()
    below = [folder_of(heap, f"in {place}", 12) for place in range(12)]
    root = heap.directory([Link(cid, b"%03d" % place, 200) for place, cid in enumerate(below)])
    samples = [tree(heap, cid) for cid in (root, *below)]
    with Server({}, trees=tuple(samples)) as server, home.mounted("--from", server.url) as mount:
        top = mount.path / cids.text(root)
        os.listdir(top)
        for place in range(3):
            read_all(top / f"{place:03}", f"in {place}", 12)
        wait_until(
            lambda: below[2 + DIRECTORIES_AHEAD] in asked_for(server, "all"),
            "the directories ahead were asked for",
        )
        assert set(asked_for(server, "all")) <= set(below[: 3 + DIRECTORIES_AHEAD])
        beyond = [
            cid for sample in samples[4 + DIRECTORIES_AHEAD :] for cid in sample.blocks if cid != sample.root
        ]
        assert not asked_as_blocks(server) & set(beyond), "contents of later directories are not fetched yet"
        for place in range(3, 12):
            read_all(top / f"{place:03}", f"in {place}", 12)
        assert max(map(asked_for(server, "all").count, below)) == 1


def test_a_directory_whose_links_claim_over_16_mib_is_not_fetched_as_a_whole(home: Home) -> None:
    heap = Blocks()
    count = 20
    much, little = folder_of(heap, "much", count, MAX_CONTENTS // count + 1), folder_of(heap, "little", count)
    with (
        Server({}, trees=(tree(heap, much), tree(heap, little))) as server,
        home.mounted("--from", server.url) as mount,
    ):
        read_all(mount.path / cids.text(much), "much", count)
        read_all(mount.path / cids.text(little), "little", count)
        assert asked_for(server, "all") == [little]
