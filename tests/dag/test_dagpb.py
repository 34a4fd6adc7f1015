"""The dag-pb codec against the specification's rules and its conformance fixtures."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb
from ipfsfuse.dag.cid import RAW, Cid
from ipfsfuse.dag.dagpb import Link, PBNode
from ipfsfuse.errors import Malformed
from tests.dag.blocks import cid_of, field, fixtures, identity

CID = cid_of(b"x", RAW)
HASH = field(1, CID)
NAME = field(2, b"name")
TSIZE = field(3, 7)


def test_every_fixture_decodes_and_encodes_to_its_own_cid() -> None:
    """Except fixtures whose links leave out a field, because `encode` writes all fields."""
    whole = 0
    for path in fixtures("codec-fixtures/dag-pb/*.dag-pb"):
        block, cid = path.read_bytes(), cids.parse(path.name.split(".")[1])
        node = dagpb.decode(block)
        again = dagpb.encode(node.links, node.data)
        assert dagpb.decode(again) == node, path.name
        if len(again) == len(block):
            whole += 1
            cids.verify(cid, again)
    assert whole > 1


def test_every_negative_fixture_is_refused_with_its_error() -> None:
    (path,) = fixtures("codec-fixtures/negative/dag-pb-decode-edges.json")
    for case in json.loads(path.read_text()):
        with pytest.raises(Malformed) as refused:
            dagpb.decode(bytes.fromhex(case["hex"]))
        assert case["error"].lower() in str(refused.value).lower(), case["name"]


REFUSED = {
    "a group's wire type": b"\x0b\x00",
    "data as a number": field(1, 5),
    "links as a number": field(2, 5),
    "field 3 in a node": field(3, b""),
    "field 0 in a node": b"\x02\x00",
    "a tag in a longer form": b"\x92\x00" + b"\x00",
    "data twice": field(1, b"a") + field(1, b"b"),
    "data between links": field(2, HASH) + field(1, b"a") + field(2, HASH),
    "links behind data and links": field(1, b"a") + field(2, HASH) + field(1, b"a"),
    "a link without a hash": field(2, NAME + TSIZE),
    "name before hash": field(2, NAME + HASH),
    "tsize before name": field(2, HASH + TSIZE + NAME),
    "tsize before hash": field(2, TSIZE + HASH),
    "hash twice": field(2, HASH + HASH),
    "name twice": field(2, HASH + NAME + NAME),
    "tsize twice": field(2, HASH + NAME + TSIZE + TSIZE),
    "field 4 in a link": field(2, HASH + NAME + TSIZE + field(4, 1)),
    "hash as a number": field(2, field(1, 1)),
    "name as a number": field(2, HASH + field(2, 1)),
    "tsize as bytes": field(2, HASH + NAME + field(3, b"7")),
    "tsize over 64 bits": field(2, HASH + NAME + b"\x18" + b"\xff" * 9 + b"\x02"),
    "tsize of 11 bytes": field(2, HASH + NAME + b"\x18" + b"\x80" * 10 + b"\x01"),
    "tsize cut short": field(2, HASH + NAME + b"\x18"),
    "tsize that does not end": field(2, HASH + NAME + b"\x18\x80"),
    "a name longer than its link": field(2, HASH + b"\x12\x7f" + b"n" * 20),
    "a CID of version 2": field(2, field(1, b"\x02" + CID[1:])),
    "a CID of version 0 in two bytes": field(2, field(1, b"\x80\x00" + CID[1:])),
    "a CID with a byte too many": field(2, field(1, CID + b"x")),
    "a CID with a byte too few": field(2, field(1, CID[:-1])),
    "a version 0 CID of 33 bytes": field(2, field(1, b"\x12\x20" + bytes(31))),
    "a link cut short": b"\x12\x7f" + HASH,
    "a length cut short": b"\x12\x80",
    "a length of no byte": b"\x12",
    "data cut short": b"\x0a\x05abc",
}


@pytest.mark.parametrize("block", REFUSED.values(), ids=REFUSED.keys())
def test_a_node_that_breaks_a_rule_is_refused(block: bytes) -> None:
    with pytest.raises(Malformed):
        dagpb.decode(block)


def test_data_may_come_first_and_lengths_may_be_padded_as_in_go_codec_dagpb() -> None:
    assert dagpb.decode(field(1, b"d") + field(2, HASH + NAME + TSIZE)) == PBNode(
        [Link(CID, b"name", 7)], b"d"
    )
    padded = b"\x12" + bytes([0x80 | len(HASH + NAME + TSIZE), 0x00]) + HASH + NAME + TSIZE
    assert dagpb.decode(padded).links == [Link(CID, b"name", 7)]
    assert dagpb.decode(field(2, HASH + NAME + b"\x18\x87\x00")).links == [Link(CID, b"name", 7)]


def test_absent_fields_of_links_read_as_empty_ones() -> None:
    full, bare = HASH + field(2, b"") + field(3, 0), HASH
    node = dagpb.decode(field(2, full) + field(2, bare) + field(2, HASH + field(3, 0)) + field(2, full))
    assert node.links == [Link(CID, b"", 0)] * 4
    assert dagpb.decode(b"") == PBNode([], None)
    assert dagpb.decode(field(1, b"")) == PBNode([], b"")


def test_a_link_may_be_an_identity_cid_of_any_length() -> None:
    long = identity(b"x" * 700)
    assert dagpb.decode(dagpb.encode([Link(long, b"n", 1)], None)).links[0].cid == long


CIDS = st.one_of(
    st.binary(min_size=32, max_size=32).map(lambda digest: Cid(b"\x12\x20" + digest)),
    st.binary(min_size=32, max_size=32).map(lambda digest: Cid(b"\x01\x55\x12\x20" + digest)),
    st.binary(min_size=32, max_size=32).map(lambda digest: Cid(b"\x01\x70\x12\x20" + digest)),
    st.binary(min_size=64, max_size=64).map(lambda digest: Cid(b"\x01\xa9\x02\x13\x40" + digest)),
    st.binary(max_size=200).map(identity),
)
SIZES = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 127, 128, 2**14 - 1, 2**14, 2**21 - 1, 2**21, 2**28 - 1, 2**28, 2**63]),
)
LINKS = st.builds(
    Link,
    CIDS,
    st.one_of(st.binary(max_size=300), st.just(b""), st.just(b"n" * 127), st.just(b"n" * 128)),
    SIZES,
)


@given(st.lists(LINKS, max_size=12), st.none() | st.binary(max_size=300))
def test_encode_and_decode_are_inverse(links: list[Link], data: bytes | None) -> None:
    assert dagpb.decode(dagpb.encode(links, data)) == PBNode(links, data)
