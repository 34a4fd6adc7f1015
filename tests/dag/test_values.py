"""dag-cbor and dag-json: what a block's values are, and which blocks are refused."""

import hashlib
import json
import random
import struct

import libipld
import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import directory_pages, nodes, traversal, values
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File
from ipfsfuse.errors import Malformed, Unsupported

CHILD = cids.make(cids.RAW, b"\x12\x20" + hashlib.sha256(b"child").digest())
LINK = b"\xd8\x2a\x58\x25\x00" + CHILD


def cid_of(block: bytes, codec: int = cids.DAG_CBOR) -> Cid:
    return cids.make(codec, b"\x12\x20" + hashlib.sha256(block).digest())


def tree(cid: Cid, block: bytes) -> object:
    """All that a block shows: directories as dicts, files as bytes, links as CIDs."""
    node = nodes.parse(cid, block)
    if isinstance(node, File):
        found = nodes.document(cid, block)
        content = found.content(cids.value_place(cid)[1])
        assert len(content) == node.size
        return content
    assert isinstance(node, Directory)
    return {
        link.name.decode(): tree(link.cid, block) if cids.is_value(link.cid) else link.cid
        for link in node.links
    }


SHOWN = {
    "bytes": b"\0\xff", "flag": b"true", "link": CHILD, "list": {"0": b"1", "1": {}, "2": {"x": CHILD}},
    "minus": b"-5", "none": b"null", "pi": b"3.5", "text": "ü".encode(), "zero": b"0",
}  # fmt: skip


def test_a_dag_cbor_block_shows_as_directories_and_files() -> None:
    block = (
        b"\xa9\x62pi\xfb" + struct.pack(">d", 3.5) + b"\x64flag\xf5\x64link" + LINK +
        b"\x64list\x83\x01\x80\xa1\x61x" + LINK + b"\x64none\xf6\x64text\x62" + "ü".encode() +
        b"\x64zero\x00\x65bytes\x42\x00\xff\x65minus\x24"
    )  # fmt: skip
    cid = cid_of(block)
    assert tree(cid, block) == SHOWN
    assert nodes.links(cid, block) == [CHILD, CHILD]
    assert nodes.children(nodes.parse(cid, block)) == [CHILD, CHILD]
    inside = next(link.cid for link in nodes.parse(cid, block).links if link.name == b"list")  # type: ignore[union-attr]
    assert cids.block_of(inside) == cid
    assert cids.parse(cids.text(inside)) == inside  # the mount accepts this text as a name
    assert nodes.children(nodes.parse(inside, block)) == []


def test_a_dag_json_block_shows_the_same() -> None:
    link = {"/": cids.text(CHILD)}
    whole = {
        "bytes": {"/": {"bytes": "AP8"}}, "flag": True, "link": link, "list": [1, [], {"x": link}],
        "minus": -5, "none": None, "pi": 3.5, "text": "ü", "zero": 0,
    }  # fmt: skip
    for block in (json.dumps(whole).encode(), json.dumps(whole, ensure_ascii=False, indent=1).encode()):
        cid = cid_of(block, cids.DAG_JSON)
        assert tree(cid, block) == SHOWN
        assert nodes.links(cid, block) == [CHILD, CHILD]


@pytest.mark.parametrize(
    ("block", "shown"),
    [
        (b"\x63abc", b"abc"),
        (b"\x43abc", b"abc"),
        (b"\x18\x64", b"100"),
        (b"\x1b" + b"\xff" * 8, b"18446744073709551615"),
        (LINK, b'{"/":"%s"}' % cids.text(CHILD).encode()),
        (b"\xa0", {}),
        (b"\x80", {}),
    ],
)
def test_a_block_that_is_one_value(block: bytes, shown: object) -> None:
    assert tree(cid_of(block), block) == shown


MALFORMED_CBOR = {
    "nothing": b"",
    "two values": b"\x01\x01",
    "cut short": b"\x63ab",
    "a key twice": b"\xa2\x61a\x01\x61a\x02",
    "keys out of order": b"\xa2\x61b\x01\x61a\x02",
    "a key that is a number": b"\xa1\x01\x01",
    "text that is not UTF-8": b"\x61\xff",
    "an indefinite list": b"\x9f\x01\xff",
    "another tag": b"\xc1\x01",
    "a link without its zero byte": b"\xd8\x2a\x43\x01\x01\x02",
    "a link that is not a CID": b"\xd8\x2a\x43\x00\x01\x02",
    "not a number": b"\xfb\x7f\xf8\0\0\0\0\0\0",
    "a short float": b"\xfa\x3f\x80\0\0",
    "undefined": b"\xf7",
    "an integer in a longer form": b"\x18\x01",
    "a length in a longer form": b"\x58\x01a",
    "a list longer than the block": b"\x9b\x00\x00\x00\xff\xff\xff\xff\xff",
    "100,000 lists in each other": b"\x81" * 100_000 + b"\x01",
}
MALFORMED_JSON = {
    "nothing": "",
    "two values": "1 1",
    "a key twice": '{"a":1,"a":2}',
    "NaN": "NaN",
    "an infinite float": "1e999",
    "a huge integer": "18446744073709551616",
    "an integer of 5,000 digits": "1" * 5000,
    "half a surrogate pair": '"\\ud800"',
    "half a surrogate pair in a key": '{"\\ud800":1}',
    "a link that is not a CID": '{"/":"x"}',
    "bytes with padding": '{"/":{"bytes":"AA=="}}',
    "bytes that are not base64": '{"/":{"bytes":"*"}}',
    "bytes cut short": '{"/":{"bytes":"A"}}',
    "the reserved key with a number": '{"/":1}',
    "the reserved key and another": '{"/":"x","b":1}',
    "100,000 lists in each other": "[" * 100_000 + "]" * 100_000,
}


@pytest.mark.parametrize("block", MALFORMED_CBOR.values(), ids=MALFORMED_CBOR.keys())
def test_malformed_dag_cbor_is_refused_by_name(block: bytes) -> None:
    with pytest.raises(Malformed, match=r"^bafy.*dag-cbor"):
        nodes.parse(cid_of(block), block)


@pytest.mark.parametrize("text", MALFORMED_JSON.values(), ids=MALFORMED_JSON.keys())
def test_malformed_dag_json_is_refused_by_name(text: str) -> None:
    block = text.encode()
    with pytest.raises(Malformed, match=r"^bag.*dag-json"):
        nodes.parse(cid_of(block, cids.DAG_JSON), block)
    with pytest.raises(Malformed):
        nodes.parse(cid_of(b"\xff", cids.DAG_JSON), b"\xff")


def test_a_block_that_is_too_deep_or_too_large_is_refused_but_its_links_are_known() -> None:
    deep = b"\x81" * (values.MAX_NESTING + 1) + LINK
    much = b"\x9a" + struct.pack(">I", values.MAX_VALUES) + b"\x00" * values.MAX_VALUES
    for block, why in ((deep, "129 deep"), (much, "131073 values")):
        with pytest.raises(Unsupported, match=why):
            nodes.parse(cid_of(block), block)
    assert nodes.links(cid_of(deep), deep) == [CHILD]
    assert isinstance(nodes.parse(cid_of(deep[1:]), deep[1:]), Directory)
    assert isinstance(nodes.parse(cid_of(b"x"), b"\x99\xff\xff" + b"\x00" * 0xFFFF), Directory)


def test_names_that_no_file_system_can_hold_are_left_out() -> None:
    names = ["", ".", "..", "a/b", "nul\0", "x" * 255, "x" * 256]
    block = libipld.encode_dag_cbor(dict.fromkeys(names, 1))
    cid = cid_of(block)
    directory = nodes.parse(cid, block)
    assert isinstance(directory, Directory)
    steps = directory_pages.entries(directory, 0)
    with pytest.raises(StopIteration) as stop:
        next(steps)
    page = stop.value.value
    assert ([entry.name for entry in page.entries], page.skipped) == ([b"x" * 255], 6)
    assert page.entries[0].tsize < 0  # nothing states a size
    with pytest.raises(StopIteration) as stop:
        next(traversal.child(directory, b"a/b"))
    assert stop.value.value is None


def test_a_cid_of_a_value_that_ipfsfuse_does_not_make_is_refused() -> None:
    """Content and users can write such a CID."""
    block = b"\x82\x01\x02"
    with pytest.raises(Malformed, match="3 values"):
        nodes.parse(cids.value(cid_of(block), 3), block)
    for of in (CHILD, cids.value(cid_of(block), 1)):
        with pytest.raises(Malformed, match="name a value"):
            nodes.parse(cids.value(of, 0), block)
    with pytest.raises(Malformed, match="name a value"):
        nodes.parse(Cid(cids.make(cids.VALUE, b"\x00\x00")), block)


def test_changed_bytes_are_refused_or_shown() -> None:
    chance = random.Random(7)
    whole = {"a": [1, "two", b"three", None, 4.5, {"b": {"c": [True, False]}}], "link": b"x"}
    cbor = libipld.encode_dag_cbor(whole)[:-2] + LINK
    text = json.dumps(
        {"a": [1, "two", None, 4.5e3, {"b": {"/": cids.text(CHILD)}}], "c": {"/": {"bytes": "AP8"}}}
    )
    for codec, block in ((cids.DAG_CBOR, cbor), (cids.DAG_JSON, text.encode())):
        for _ in range(3000):
            changed = bytearray(block)
            for _ in range(chance.randrange(1, 4)):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            try:
                tree(cid_of(bytes(changed), codec), bytes(changed))
            except (Malformed, Unsupported):
                continue
