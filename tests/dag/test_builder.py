"""The reader reads what the builder builds: contents, shapes and names. (tests/importer compares the CIDs
with Kubo's.)"""

from dataclasses import replace
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipfsfuse.dag import builder, hamt, nodes, traversal
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import (
    NO_ATTRIBUTES,
    UNIXFS_V0_2015,
    UNIXFS_V1_2025,
    Built,
    FileBuilder,
    Profile,
    Stored,
)
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Shard, Symlink
from ipfsfuse.dag.traversal import Walk
from ipfsfuse.errors import Unsupported

T = TypeVar("T")
SMALL = replace(UNIXFS_V1_2025, chunk_size=3, file_links=3, shard_threshold=500, hamt_width=8)
PROFILES = [
    SMALL,
    SMALL.with_metadata(),
    replace(UNIXFS_V0_2015, chunk_size=3, file_links=3, shard_threshold=300, hamt_width=8),
]


class Store:
    """A sink that verifies and keeps all blocks. It wants children before their parents."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}

    def put(self, cid: Cid, block: bytes) -> None:
        cids.verify(cid, block)
        assert {cids.multihash(child) for child in nodes.links(cid, block)} <= self.blocks.keys()
        self.blocks[cids.multihash(cid)] = block

    def get(self, cid: Cid) -> bytes:
        return self.blocks[cids.multihash(cid)]

    def node(self, cid: Cid) -> nodes.Node:
        return nodes.parse(cid, self.get(cid))

    def run(self, steps: Walk[T]) -> T:
        """Runs a walk to its end."""
        try:
            wanted = next(steps)
            while True:
                wanted = steps.send([self.node(cid) for cid in wanted])
        except StopIteration as stop:
            found: T = stop.value
            return found

    def file(self, profile: Profile, data: bytes, stored: Stored = NO_ATTRIBUTES) -> Built:
        chunks = [data[at : at + profile.chunk_size] for at in range(0, len(data), profile.chunk_size)] or [
            b""
        ]
        if len(chunks) == 1:
            block = builder.leaf(profile, data, stored)
            self.put(block.built.cid, block.block)
            return block.built
        file_builder = FileBuilder(profile, self.put)
        for chunk in chunks:
            block = builder.leaf(profile, chunk)
            self.put(block.built.cid, block.block)
            file_builder.add(block.built)
        return file_builder.finish(stored)

    def content(self, cid: Cid, links: int) -> tuple[bytes, int]:
        """(content, height) of a file. Checks that all leaves have the same depth, and that no node has more
        than `links` children."""
        node = self.node(cid)
        assert isinstance(node, File)
        if not node.children:
            block = self.get(cid)
            data = (
                block
                if cids.codec(cid) == cids.RAW
                else block[block.index(b"\x12") + 2 :][: node.inline]
                if node.inline
                else b""
            )
            assert len(data) == node.size
            return data, 0
        assert len(node.children) <= links
        below = [self.content(child.cid, links) for child in node.children]
        assert [len(data) for data, _height in below] == [child.size for child in node.children]
        assert len({height for _data, height in below}) == 1
        return b"".join(data for data, _height in below), below[0][1] + 1

    def tsize(self, cid: Cid) -> int:
        """The size that a link to `cid` should claim."""
        node = self.node(cid)
        children = node.children if isinstance(node, File) else []
        return len(self.get(cid)) + sum(self.tsize(child.cid) for child in children)


@pytest.mark.parametrize("profile", PROFILES, ids=["raw leaves", "dag-pb leaves", "v0"])
@given(data=st.binary(max_size=120))
def test_files_are_balanced_and_read_back(profile: Profile, data: bytes) -> None:
    store = Store()
    built = store.file(profile, data)
    content, height = store.content(built.cid, profile.file_links)
    assert content == data
    assert built.size == len(data)
    assert built.tsize == store.tsize(built.cid)
    chunks = max(1, -(-len(data) // profile.chunk_size))
    assert profile.file_links ** (height - 1) < chunks <= profile.file_links**height


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30).map(
    str.encode
)


@settings(max_examples=30)
@given(
    st.dictionaries(NAMES.filter(lambda name: name not in (b".", b"..")), st.binary(max_size=10), max_size=60)
)
def test_every_name_is_found_and_another_name_is_not(files: dict[bytes, bytes]) -> None:
    for profile in PROFILES:
        store = Store()
        children = [(name, store.file(profile, data)) for name, data in files.items()]
        built = builder.directory(profile, children, NO_ATTRIBUTES, store.put)
        root = store.node(built.cid)
        assert isinstance(root, Directory | Shard)
        for name, child in children:
            link = store.run(traversal.child(root, name))
            assert link is not None
            assert (link.cid, link.tsize) == (child.cid, child.tsize)
        assert (
            store.run(
                traversal.child(
                    root, b"no such name, nor ever will be, for it is too long for the texts above"
                )
            )
            is None
        )


@pytest.mark.parametrize("profile", PROFILES)
def test_wide_directories_are_sharded(profile: Profile) -> None:
    store = Store()
    names = [str(number).encode() for number in range(3000)]
    leaf = store.file(profile, b"x")
    built = builder.directory(profile, [(name, leaf) for name in names], NO_ATTRIBUTES, store.put)
    root = store.node(built.cid)
    assert isinstance(root, Shard)
    assert all(store.run(traversal.child(root, name)) for name in names)
    assert store.run(traversal.child(root, b"3000")) is None


def test_order_of_names_does_not_matter() -> None:
    store = Store()
    leaf = store.file(SMALL, b"x")
    children = [(str(number).encode(), leaf) for number in range(500)]
    assert builder.directory(SMALL, children, NO_ATTRIBUTES, store.put) == builder.directory(
        SMALL, children[::-1], NO_ATTRIBUTES, store.put
    )


@pytest.mark.parametrize("mode", [None, 0o640, 0o777])
@pytest.mark.parametrize("mtime", [None, 0, 1, -1, 1_700_000_000_123_456_789, 1_700_000_000_000_000_000])
def test_attributes_are_read_back(mode: int | None, mtime: int | None) -> None:
    store = Store()
    profile = SMALL.with_metadata()
    stored = Stored(mode, mtime)
    many = [(str(number).encode(), store.file(profile, b"x")) for number in range(50)]
    for built in (
        store.file(profile, b"", stored),
        store.file(profile, b"abc", stored),
        store.file(profile, bytes(100), stored),
        builder.directory(profile, [], stored, store.put),
        builder.directory(profile, many, stored, store.put),
    ):
        assert store.node(built.cid).meta == nodes.Meta(mode, mtime)
    link = store.node(builder.symlink(profile, b"target", stored, store.put).cid)
    assert isinstance(link, Symlink)
    assert (link.target, link.meta) == (b"target", nodes.Meta(None, mtime))


def test_names_with_the_same_hash_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamt, "hash64", lambda _name: 77)  # finding 64 equal bits would take too long
    store = Store()
    leaf = store.file(SMALL, b"x")
    with pytest.raises(Unsupported, match="have the same hash"):
        builder.directory(
            SMALL, [(bytes([65 + number]) * 20, leaf) for number in range(20)], NO_ATTRIBUTES, store.put
        )
