"""The dag-cbor and dag-json codecs: finds the values in a block, and their places.

A map or a list is shown as a directory, a link as its target, and any other value as a file. The file holds
bytes and text as they are, and a number, true, false or null as dag-json text. The entries of a list are
named 0, 1, 2 and so on.

`libipld` checks dag-cbor (https://ipld.io/specs/codecs/dag-cbor/spec/), this module checks dag-json
(https://ipld.io/specs/codecs/dag-json/spec/). Pure functions. A block of 2 MiB can take a second: decode
large blocks in a worker thread.
"""

import base64
import binascii
import json
import math
import struct
from array import array
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NoReturn

import libipld

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.dagpb import Links
from ipfsfuse.errors import Malformed, NotACid, Unsupported

SHOWN_CODECS = (cids.DAG_CBOR, cids.DAG_JSON)
MAX_VALUES = 1 << 17
"""The most values of a block that is shown. In a listing, each takes some 60 bytes of memory."""
MAX_NESTING = 128
"""The deepest nesting of maps and lists that is shown."""


class Kind(IntEnum):
    MAP = 0
    LIST = 1
    CONTENT = 2
    LINK = 3


class Document:
    """The values of one block, by number. The whole is number 0. A map or list comes before its values.

    It keeps the block, and 21 bytes for each value.
    """

    __slots__ = ("_ends", "_kinds", "_spans", "buffer", "depth", "irregular")

    def __init__(self) -> None:
        self.buffer = b""
        """The content of all values. For dag-cbor: the block, followed by the texts of its numbers."""
        self.depth = 0
        self.irregular = ""
        """The reason why a strict decoder would refuse this block, though it can be read."""
        self._kinds = bytearray()
        self._ends = array("I")
        """For each value, the number after the last value in it."""
        self._spans = array("I")
        """For each value, the start and end of its content or CID in `buffer`; then those of its key in a
        map."""

    def __len__(self) -> int:
        return len(self._kinds)

    @property
    def size(self) -> int:
        """Its memory, in bytes."""
        return len(self.buffer) + 21 * len(self)

    def kind(self, number: int) -> Kind:
        return Kind(self._kinds[number])

    def content(self, number: int) -> bytes:
        """The content of a file. A block that is only a link is a file too, with the dag-json of the link."""
        start, end = self._spans[4 * number : 4 * number + 2]
        found = self.buffer[start:end]
        if self._kinds[number] == Kind.LINK:
            return b'{"/":"%s"}' % cids.text(Cid(found)).encode()
        return found

    def content_size(self, number: int) -> int:
        if self._kinds[number] == Kind.LINK:
            return len(self.content(number))
        return self._spans[4 * number + 1] - self._spans[4 * number]

    def links(self, number: int, block_cid: Cid) -> Links:
        """The entries of a map or list. The CID of an entry is the link itself, or `cids.value` for any other
        value."""
        buffer, spans = bytearray(), list[int]()
        named = self._kinds[number] == Kind.MAP
        for place, child in enumerate(self._children(number)):
            start, end, key, key_end = self._spans[4 * child : 4 * child + 4]
            is_link = self._kinds[child] == Kind.LINK
            buffer += self.buffer[start:end] if is_link else cids.value(block_cid, child)
            spans += (spans[-1] if spans else 0, len(buffer))
            buffer += self.buffer[key:key_end] if named else b"%d" % place
            spans += (len(buffer) - (key_end - key) if named else spans[-1], len(buffer))
        links = Links(bytes(buffer))
        for at in range(0, len(spans), 4):
            start, end, name, name_end = spans[at : at + 4]
            links.add(start, end, name, name_end, 0)
        return links

    def targets(self) -> list[Cid]:
        """All CIDs that the block links, in order."""
        return [
            Cid(self.buffer[self._spans[4 * number] : self._spans[4 * number + 1]])
            for number, kind in enumerate(self._kinds)
            if kind == Kind.LINK
        ]

    def _children(self, number: int) -> Iterator[int]:
        child, end = number + 1, self._ends[number]
        while child < end:
            yield child
            child = self._ends[child]

    # -- filling ---------------------------------------------------------------------------------------------

    def add(self, kind: Kind, start: int, end: int, key: int, key_end: int) -> int:
        """Appends a value. Returns its number."""
        self._kinds.append(kind)
        self._ends.append(len(self._kinds))
        self._spans.extend((start, end, key, key_end))
        return len(self._kinds) - 1

    def close(self, number: int) -> None:
        """Ends a map or list: all its values were added."""
        self._ends[number] = len(self._kinds)


def decode(codec: int, block: bytes) -> Document:
    """The values in a block of dag-cbor or dag-json. Raises Malformed."""
    return _cbor(block) if codec == cids.DAG_CBOR else _json(block)


def shown(codec: int, block: bytes) -> Document:
    """Decodes a block to show it as files. Raises Malformed if a strict decoder would refuse the block,
    Unsupported if it is nested too deeply or has too many values."""
    found = decode(codec, block)
    if found.irregular:
        raise Malformed(found.irregular)
    if found.depth > MAX_NESTING:
        raise Unsupported(f"maps and lists {found.depth} deep: at most {MAX_NESTING} are shown")
    if len(found) > MAX_VALUES:
        raise Unsupported(f"a block with {len(found)} values: at most {MAX_VALUES} are shown")
    return found


# -- dag-cbor ------------------------------------------------------------------------------------------------

_BYTES, _TEXT, _LIST, _MAP, _TAG, _SIMPLE = 2, 3, 4, 5, 6, 7
_WORDS = {20: b"false", 21: b"true", 22: b"null"}


def _cbor(block: bytes) -> Document:
    try:
        libipld.decode_dag_cbor(
            block
        )  # it gives links and bytes alike as bytes: the pass below tells them apart
    except (ValueError, RecursionError) as exc:
        raise Malformed(f"not dag-cbor: {exc}") from exc
    found, texts = Document(), bytearray()
    inside: list[list[int]] = []
    """For each open map or list: its number, and how many values are still to come."""
    at = 0
    while True:
        while inside and not inside[-1][1]:
            found.close(inside.pop()[0])
        if at == len(block):
            break
        key = key_end = 0
        if inside:
            inside[-1][1] -= 1
            if found.kind(inside[-1][0]) is Kind.MAP:
                _major, size, key = _head(block, at, found)
                at = key_end = key + size
        head = at
        major, value, at = _head(block, at, found)
        if major == _TAG:
            _major, value, at = _head(block, at, found)
            found.add(Kind.LINK, at + 1, at + value, key, key_end)  # after a zero, the identity multibase
            at += value
        elif major in (_BYTES, _TEXT):
            found.add(Kind.CONTENT, at, at + value, key, key_end)
            at += value
        elif major in (_LIST, _MAP):
            inside.append([found.add(Kind(_MAP - major), 0, 0, key, key_end), value])
            found.depth = max(found.depth, len(inside))
        else:
            text = _scalar(block, head, major, value, found)
            start = len(block) + len(texts)
            found.add(Kind.CONTENT, start, start + len(text), key, key_end)
            texts += text
    found.buffer = block + bytes(texts)
    return found


def _head(block: bytes, at: int, found: Document) -> tuple[int, int, int]:
    """(major type, its number, the index after it) of one head of well-formed CBOR (RFC 8949, section 3)."""
    major, value = block[at] >> 5, block[at] & 31
    at += 1
    if value < 24:
        return major, value, at
    size = 1 << (value - 24)
    value = int.from_bytes(block[at : at + size])
    if major != _SIMPLE and value < (24 if size == 1 else 1 << (4 * size)):
        found.irregular = "dag-cbor with a number that is not in its shortest form"
    return major, value, at + size


def _scalar(block: bytes, at: int, major: int, value: int, found: Document) -> bytes:
    """The dag-json text of a number, a boolean or null. Its head is at `at`."""
    if major == 0:
        return b"%d" % value
    if major == 1:
        return b"%d" % (-1 - value)
    kind = block[at] & 31
    if kind in _WORDS:
        return _WORDS[kind]
    size = 1 << (kind - 24)
    if size != 8:
        found.irregular = "dag-cbor with a float of fewer than 64 bits"
    return repr(struct.unpack({2: ">e", 4: ">f", 8: ">d"}[size], block[at + 1 : at + 1 + size])[0]).encode()


# -- dag-json ------------------------------------------------------------------------------------------------


class _Map(list[tuple[str, Any]]):
    """The pairs of a JSON object, in their order."""


class _Scalar(str):
    """The text of a number."""

    __slots__ = ()


def _json(block: bytes) -> Document:
    try:
        whole = _decoder.decode(block.decode("utf-8"))
    except (ValueError, RecursionError) as exc:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise Malformed(f"not dag-json: {exc}") from exc
    found, buffer = Document(), bytearray()

    def put(content: bytes) -> tuple[int, int]:
        buffer.extend(content)
        return len(buffer) - len(content), len(buffer)

    def add(value: Any, name: str | None) -> None:
        key = put(_utf8(name)) if name is not None else (0, 0)
        special = _special(value) if isinstance(value, _Map) else None
        if special is not None:
            found.add(special[0], *put(special[1]), *key)
        elif isinstance(value, _Map):
            pairs = iter(value)
            inside.append((found.add(Kind.MAP, 0, 0, *key), pairs))
        elif isinstance(value, list):
            inside.append((found.add(Kind.LIST, 0, 0, *key), iter([(None, one) for one in value])))
        else:
            found.add(Kind.CONTENT, *put(_text(value)), *key)
        found.depth = max(found.depth, len(inside))

    inside: list[tuple[int, Iterator[tuple[str | None, Any]]]] = []
    add(whole, None)
    while inside:
        number, rest = inside[-1]
        for name, value in rest:
            add(value, name)
            break
        else:
            found.close(number)
            inside.pop()
    found.buffer = bytes(buffer)
    return found


def _special(pairs: _Map) -> tuple[Kind, bytes] | None:
    """The link or the bytes that a map stands for; None for any other map. Raises Malformed for a wrong use
    of the reserved key."""
    if not pairs or pairs[0][0] != "/":
        return None
    value = pairs[0][1]
    if len(pairs) == 1 and type(value) is str:
        try:
            return Kind.LINK, cids.parse(value)
        except NotACid as exc:
            raise Malformed(f"not dag-json: a link: {exc}") from exc
    if len(pairs) == 1 and isinstance(value, _Map) and [key for key, _value in value] == ["bytes"]:
        text = value[0][1]
        try:
            if type(text) is str and "=" not in text:
                return Kind.CONTENT, base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError) as exc:
            raise Malformed(f"not dag-json: bytes: {exc}") from exc
    raise Malformed('not dag-json: a map with the reserved key "/" that is neither a link nor bytes')


def _text(value: Any) -> bytes:
    if value is None or isinstance(value, bool):
        return json.dumps(value).encode()
    return _utf8(value)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise Malformed("not dag-json: a text with half of a surrogate pair") from exc


def _pairs(pairs: list[tuple[str, Any]]) -> _Map:
    if len({key for key, _value in pairs}) < len(pairs):
        raise ValueError("a map with one key twice")
    return _Map(pairs)


def _integer(text: str) -> _Scalar:
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 64:
        raise ValueError("an integer of more than 64 bits")
    return _Scalar(int(text))


def _float(text: str) -> _Scalar:
    if not math.isfinite(float(text)):
        raise ValueError("a float that is out of range")
    return _Scalar(float(text))


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a value of dag-json")


_decoder = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_int=_integer, parse_float=_float, parse_constant=_no_constant
)
