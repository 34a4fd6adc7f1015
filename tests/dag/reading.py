"""Reads nodes, listings and ranges of a heap of blocks, as the layers above `dag` do."""

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import directory_pages, file_layout, traversal
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.directory_pages import Page
from ipfsfuse.dag.nodes import Directory, File, Leaf, Shard
from ipfsfuse.errors import NotALeaf
from tests.dag.blocks import Blocks


def directory(heap: Blocks, cid: Cid) -> Directory | Shard:
    found = heap.drive(traversal.node(cid))
    assert isinstance(found, Directory | Shard)
    heap.asked.clear()
    return found


def pages(heap: Blocks, here: Directory | Shard, after: int = 0) -> list[Page]:
    """All pages of a directory. Checks that cookies grow, and that only the last page may be empty."""
    found: list[Page] = []
    while not found or not found[-1].end:
        page = heap.drive(directory_pages.entries(here, after))
        assert page.entries or page.end
        for entry in page.entries:
            assert after < entry.cookie < 1 << 63
            after = entry.cookie
        found.append(page)
    return found


def names(found: list[Page]) -> list[bytes]:
    return [entry.name for page in found for entry in page.entries]


def file(heap: Blocks, cid: Cid) -> File:
    found = heap.drive(traversal.node(cid))
    assert isinstance(found, File)
    heap.asked.clear()
    return found


def read(heap: Blocks, root: File, offset: int, size: int) -> bytes:
    """Reads as the layers above do: again with `sure`, if a block was taken for a leaf and is not one."""
    try:
        return read_range(heap, root, offset, size, False)
    except NotALeaf:
        return read_range(heap, root, offset, size, True)


def read_range(heap: Blocks, root: File, offset: int, size: int, sure: bool) -> bytes:
    at, stop, parts = offset, min(offset + size, root.size), bytearray()
    while at < stop:
        found = heap.drive(file_layout.leaves(root, at, stop - at, sure))
        assert found
        assert found[0].offset <= at < found[0].offset + found[0].size
        for leaf in found:
            data = content_of(heap, leaf)
            parts += data[at - leaf.offset : stop - leaf.offset]
            at = leaf.offset + leaf.size
    return bytes(parts)


def content_of(heap: Blocks, leaf: Leaf) -> memoryview:
    held = cids.inline_block(leaf.cid)
    if held is None:
        heap.asked.append([leaf.cid])
        held = heap.block(leaf.cid)
    return file_layout.leaf_content(leaf, held)
