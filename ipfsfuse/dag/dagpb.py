"""The dag-pb codec: one block <-> its links and data.

`decode` is as strict as the specification (https://ipld.io/specs/codecs/dag-pb/spec/) and go-codec-dagpb: it
refuses unknown fields, wrong wire types, fields out of order or twice, and links without a valid CID. Data
may come before or after the links, as in old blocks. `encode` writes the canonical form: links in the
caller's order, then data.

Pure functions. A block of 2 MiB can take some 100 ms: decode large blocks in a worker thread.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import protobuf, varint
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import Malformed, NotACid


class Link(NamedTuple):
    """One link of a dag-pb node. `name` is b"" if the link has none. `tsize` is the publisher's claim, in
    bytes."""

    cid: Cid
    name: bytes
    tsize: int


class Links(Sequence[Link]):
    """The links of one block, made when they are used.

    It keeps the block, and 24 bytes for each link: the places of its CID and its name in the block, and its
    tsize. A block of 2 MiB can hold 65,000 links. As objects they would take ten times as much memory as the
    block, and Python's cycle collector would visit each of them while everything else waits.
    """

    __slots__ = ("block", "spans", "tsizes")

    def __init__(self, block: bytes = b"") -> None:
        self.block = block
        self.spans = array("I")
        """For each link: the start and end of its CID, then of its name."""
        self.tsizes = array("Q")

    def __len__(self) -> int:
        return len(self.tsizes)

    @overload
    def __getitem__(self, index: int) -> Link: ...
    @overload
    def __getitem__(self, index: slice) -> list[Link]: ...
    def __getitem__(self, index: int | slice) -> Link | list[Link]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        tsize = self.tsizes[index]
        at = 4 * (index % len(self))
        start, end, name, name_end = self.spans[at : at + 4]
        return Link(Cid(self.block[start:end]), self.block[name:name_end], tsize)

    def __iter__(self) -> Iterator[Link]:
        return map(Link._make, self.parts(0, len(self)))

    def parts(self, first: int, stop: int) -> Iterator[tuple[Cid, bytes, int]]:
        """(CID, name, tsize) of the links from index `first` to `stop`."""
        block, spans = self.block, iter(self.spans[4 * first : 4 * stop])
        tsizes = self.tsizes[first:stop]
        for start, end, name, name_end, tsize in zip(spans, spans, spans, spans, tsizes, strict=False):
            yield Cid(block[start:end]), block[name:name_end], tsize

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def cids(self) -> list[Cid]:
        block = self.block
        return [Cid(block[start:end]) for start, end in zip(self.spans[::4], self.spans[1::4], strict=True)]

    def names(self) -> list[bytes]:
        block = self.block
        return [block[start:end] for start, end in zip(self.spans[2::4], self.spans[3::4], strict=True)]

    @property
    def size(self) -> int:
        """Its memory, in bytes."""
        return len(self.block) + 24 * len(self)

    def cid(self, index: int) -> Cid:
        """The CID of the link at `index`, not negative."""
        return Cid(self.block[self.spans[4 * index] : self.spans[4 * index + 1]])

    def name(self, index: int) -> bytes:
        """The name of the link at `index`, not negative."""
        return self.block[self.spans[4 * index + 2] : self.spans[4 * index + 3]]

    def add(self, cid: int, cid_end: int, name: int, name_end: int, tsize: int) -> None:
        """Appends a link whose CID and name lie at these indices of the block."""
        self.spans.extend((cid, cid_end, name, name_end))
        self.tsizes.append(tsize)


_NO_LINKS = Links()


class PBNode(NamedTuple):
    """A decoded block. `data` is None if the field is absent. A link without a name has the name b"", one
    without a tsize has 0."""

    links: Links
    data: bytes | None


MAX_LINKS = 1 << 16
"""A block of 2 MiB can have more links only if each is shorter than a hash: such a block is an attack."""

_DATA, _LINKS = 0x0A, 0x12
_HASH, _NAME, _TSIZE = 0x0A, 0x12, 0x18
"""Field number << 3 | wire type, in one byte. A tag in a longer form, which no encoder writes, is refused."""

_V1_HEADS = (b"\x0a\x24\x01\x70\x12\x20", b"\x0a\x24\x01\x55\x12\x20")
"""The start of nearly every link: the Hash field with a version 1 CID, dag-pb or raw, of sha2-256."""
_V1_END = 38
_V0_HEAD = b"\x0a\x22\x12\x20"
_V0_END = 36


def decode(block: bytes) -> PBNode:
    """The links and the data of `block`. Raises Malformed."""
    links = _NO_LINKS
    data: bytes | None = None
    at, end = 0, len(block)
    links_closed = False
    while at < end:
        tag = block[at]
        if tag == _LINKS and not links_closed:
            links = Links(block)
            at = _links(block, at, links)
            links_closed = True
        elif tag == _DATA and data is None:
            start, at = protobuf.span(block, at + 1, end)
            data = block[start:at]
        else:
            raise Malformed(_refusal(tag, data is not None))
    return PBNode(links, data)


def _links(block: bytes, at: int, links: Links) -> int:
    """Appends the run of links that begins at `at`. Returns the index after it.

    The loop itself reads links in the usual form (1 us for each). `_link` reads all others.
    """
    end = len(block)
    add_span, add_tsize = links.spans.append, links.tsizes.append
    tsize, tail_before = -1, b""
    while at < end and block[at] == _LINKS:
        start = at + 2
        size = block[at + 1] if start <= end else 0x80
        if size >= 0x80:
            start, at = protobuf.span(block, at + 1, end)
        else:
            at = start + size
            if at > end:
                raise Malformed("dag-pb: a link is cut short")
        head = block[start : start + 6]
        name_at = start + _V1_END if head in _V1_HEADS else start + _V0_END if head[:4] == _V0_HEAD else end
        # the shortest tail is `12 00 18 00`; a name of up to 127 bytes has a length of one byte
        if name_at + 4 <= at and block[name_at] == _NAME:
            name_end = name_at + 2 + block[name_at + 1]
            tail = block[name_end:at]
            if tail and tail[0] == _TSIZE and len(tail) <= 5 and block[name_at + 1] < 0x80:
                if tail != tail_before:  # all but the last of a file's children are of one size
                    tsize, tail_before = _short_tsize(tail), tail
                if tsize >= 0:
                    add_span(start + 2)
                    add_span(name_at)
                    add_span(name_at + 2)
                    add_span(name_end)
                    add_tsize(tsize)
                    continue
        _link(block, start, at, links)
        if len(links) > MAX_LINKS:
            raise Malformed(f"dag-pb: a node with over {MAX_LINKS} links")
    return at


def _short_tsize(tail: bytes) -> int:
    """The value of `18 <varint>`, with a varint of one to four bytes. -1 for anything else."""
    length = len(tail)
    last = tail[-1]
    if last >= 0x80 or length < 2:
        return -1
    if length == 2:
        return last
    value = last
    for byte in tail[-2:0:-1]:
        if byte < 0x80:
            return -1
        value = value << 7 | byte & 0x7F
    return value


def _link(block: bytes, at: int, end: int, links: Links) -> None:
    """Appends the link whose message is block[at:end]."""
    cid = name = (0, 0)
    tsize = last = 0
    while at < end:
        tag = block[at]
        if tag not in (_HASH, _NAME, _TSIZE):
            raise Malformed(f"dag-pb: a field with tag 0x{tag:02x} in a link")
        if tag <= last:
            raise Malformed(f"dag-pb: field {tag >> 3} of a link stands twice or out of order")
        last = tag
        if tag == _TSIZE:
            tsize, at = protobuf.varint(block, at + 1, end)
            continue
        start, at = protobuf.span(block, at + 1, end)
        if tag == _HASH:
            _check_cid(block[start:at])
            cid = start, at
        else:
            name = start, at
    if cid == (0, 0):
        raise Malformed("dag-pb: invalid Hash field found in link, expected CID")
    links.add(*cid, *name, tsize)


def _check_cid(data: bytes) -> None:
    try:
        cids.decode(data)
    except NotACid as exc:
        raise Malformed(f"dag-pb: invalid Hash field found in link, expected CID ({exc})") from exc


def _refusal(tag: int, have_data: bool) -> str:
    """Why a field with `tag` is not allowed at its position."""
    if tag == _LINKS:
        return "dag-pb: duplicate Links section"
    if tag == _DATA and have_data:
        return "dag-pb: duplicate Data section"
    return f"dag-pb: a field with tag 0x{tag:02x} in a node"


def encode(links: Sequence[Link], data: bytes | None) -> bytes:
    """The canonical block: `links` in the order given, each with Name and Tsize, then the data."""
    parts: list[bytes] = []
    for link in links:
        body = b"\x0a" + varint.put(len(link.cid)) + link.cid
        body += b"\x12" + varint.put(len(link.name)) + link.name + b"\x18" + varint.put(link.tsize)
        parts += (b"\x12", varint.put(len(body)), body)
    if data is not None:
        parts += (b"\x0a", varint.put(len(data)), data)
    return b"".join(parts)
