"""CIDs as bytes.

A `Cid` is the binary form of a CID (https://github.com/multiformats/cid), checked when it is made. It can be
hashed and compared. `parse` reads the text form, and `text` makes it.
"""

import hashlib
from typing import NewType

import libipld

from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag import varint
from ipfsfuse.errors import BlockTooLarge, Malformed, NotACid, WrongBlock
from ipfsfuse.structures import Buffer

Cid = NewType("Cid", bytes)
"""A checked binary CID: version 0 is 34 bytes `12 20 <digest>`; version 1 is varints version, codec, then a
multihash."""

RAW = 0x55
DAG_PB = 0x70
DAG_CBOR = 0x71
DAG_JSON = 0x0129
LIBP2P_KEY = 0x72
"""The codec of IPNS names: such a CID names a key and not a block."""
VALUE = 0x300000
"""The codec of a value within a block (`value`), from the range for private use of the multicodec table."""

MAX_CID_BYTES = 512
"""The longest CID of an allowed hash. A link may hold a longer identity CID. Such a link can't be followed,
but its directory can be listed."""

MAX_BLOCK = 2 << 20
"""Bytes of the largest block that is read: the limit of Bitswap.
Source: https://specs.ipfs.tech/bitswap-protocol/#block-sizes"""

_V0_PREFIX = multihashes.SHA2_256_PREFIX
_COMMON_V1 = (b"\x01\x70\x12\x20", b"\x01\x55\x12\x20")
_CODEC_NAMES = {
    RAW: "raw",
    DAG_PB: "dag-pb",
    0x51: "cbor",
    DAG_CBOR: "dag-cbor",
    LIBP2P_KEY: "libp2p-key",
    0x78: "git-raw",
    DAG_JSON: "dag-json",
    0x0200: "json",
}
CODECS = tuple(_CODEC_NAMES)
"""The codecs with a name here, the usual ones first."""


def decode(data: bytes) -> Cid:
    """`data` as a CID. Raises NotACid, also for bytes after the CID."""
    if len(data) == 36 and data[:4] in _COMMON_V1:
        return Cid(data)
    if data[:2] == _V0_PREFIX:
        if len(data) != 34:
            raise NotACid("a version 0 CID has 34 bytes")
        return Cid(data)
    end = _check(data)
    if end != len(data):
        raise NotACid("a CID with bytes after its digest")
    return Cid(data)


def decode_prefix(data: Buffer, start: int = 0) -> tuple[Cid, int]:
    """The CID that begins at `start` (as in a CAR section), and the index after it. Raises NotACid."""
    head = bytes(data[start : start + MAX_CID_BYTES])
    if head[:2] == _V0_PREFIX:
        if len(head) < 34:
            raise NotACid("a version 0 CID is cut short")
        return Cid(head[:34]), start + 34
    end = _check(head)
    return Cid(head[:end]), start + end


def _check(data: bytes) -> int:
    """The index after the version 1 CID at the start of `data`."""
    if (
        len(data) >= 4
        and data[0] == 1
        and data[1] < 0x80
        and data[2] < 0x80
        and data[3] < 0x80
        and len(data) >= 4 + data[3]
    ):
        return 4 + data[3]  # all varints of one byte, 1 us less
    try:
        version, at = varint.get(data, 0)
        if version != 1:
            raise NotACid(f"CID version {version} is not known")
        _codec, at = varint.get(data, at)
        _code, at = varint.get(data, at)
        length, at = varint.get(data, at)
    except Malformed as exc:
        raise NotACid(f"not a CID: {exc}") from exc
    if at + length > len(data):
        raise NotACid("a CID whose digest is cut short")
    return at + length


def parse(text_form: str) -> Cid:
    """The CID with the text form `text_form`: version 0 in base58btc, version 1 in any multibase.

    Raises NotACid."""
    if len(text_form) > 8 * MAX_CID_BYTES:
        raise NotACid(f"{text_form[:80]!r}...: far too long for a CID")
    try:
        data = _decode_text(text_form)
        if data[:2] == _V0_PREFIX and not text_form.startswith("Qm"):
            raise NotACid("version 0 has no multibase prefix")
        return decode(data)
    except Exception as exc:
        # libipld raises ValueError; multiformats KeyError, ValueError and errors of its own
        why = f" ({exc})" if isinstance(exc, NotACid) else ""
        raise NotACid(f"{text_form[:80]!r} is not a CID{why}") from exc


def _decode_text(text_form: str) -> bytes:
    if len(text_form) == 46 and text_form.startswith("Qm"):
        text_form = "z" + text_form
    if text_form.startswith("b") and text_form != text_form.lower():
        raise NotACid("base32 in upper case begins with B")
    if text_form.startswith(("7", "p")):  # base8 with padding, proquint: libipld reads neither
        from multiformats import multibase  # rare, and 100 ms to import

        return multibase.decode(text_form)
    return libipld.decode_multibase(text_form)[1]


def text(cid: Cid) -> str:
    """The usual spelling: version 0 in base58btc, version 1 in base32."""
    if cid[:2] == _V0_PREFIX:
        return libipld.encode_multibase("z", cid)[1:]
    return libipld.encode_multibase("b", cid)


def brief(cid: Cid) -> str:
    """`text` for messages. For a long identity CID, only its length."""
    return text(cid) if len(cid) <= 80 else f"a CID of {len(cid)} bytes"


def multihash_base32(cid: Cid) -> str:
    """The multihash in base32, in upper case and without padding: the name of a block in Kubo's
    repositories."""
    return libipld.encode_multibase("B", multihash(cid))[1:]


def make(codec_code: int, multihash_bytes: bytes) -> Cid:
    """A version 1 CID."""
    return Cid(b"\x01" + varint.put(codec_code) + multihash_bytes)


def codec(cid: Cid) -> int:
    """The multicodec of the block's format."""
    if cid[:2] == _V0_PREFIX:
        return DAG_PB
    code = cid[1]
    return code if code < 0x80 else varint.get(cid, 1)[0]


def codec_name(cid: Cid) -> str:
    code = codec(cid)
    return _CODEC_NAMES.get(code, f"codec 0x{code:x}")


def multihash(cid: Cid) -> bytes:
    """The multihash. Blocks are stored and found by it."""
    if cid[:2] == _V0_PREFIX:
        return cid
    return cid[2:] if cid[1] < 0x80 else cid[varint.get(cid, 1)[1] :]


def canonical(cid: Cid) -> Cid:
    """The version 1 form: equal for all spellings of one (codec, multihash)."""
    return Cid(b"\x01\x70" + cid) if cid[:2] == _V0_PREFIX else cid


EMPTY = make(RAW, multihashes.SHA2_256_PREFIX + hashlib.sha256(b"").digest())


def inline_or_empty_block(cid: Cid) -> bytes | None:
    """The block of an identity CID, which is in the CID, and the empty block: they need no source. None for
    every other CID. Raises Unsupported for an identity CID of over 128 bytes.

    The empty block is the content of an empty file. No node sends it, since Bitswap can't tell it from a
    missing block."""
    if cid[:4] in _COMMON_V1:
        return b"" if cid == EMPTY else None
    carried = multihash(cid)
    if carried[:1] != b"\0" or is_value(cid):
        return None
    multihashes.check_allowed(carried)
    return multihashes.split(carried)[1]


def inline_block(cid: Cid) -> bytes | None:
    """`inline_or_empty_block` for identity CIDs only."""
    return None if cid[:4] in _COMMON_V1 else inline_or_empty_block(cid)


def value(block: Cid, number: int) -> Cid:
    """A private name for a value within a dag-cbor or dag-json block: the identity hash of the value's number
    and the block's CID. So no table of such values is needed."""
    carried = varint.put(number) + block
    return make(VALUE, b"\0" + varint.put(len(carried)) + carried)


_VALUE_PREFIX = b"\x01" + varint.put(VALUE) + b"\0"


def is_value(cid: Cid) -> bool:
    return cid[: len(_VALUE_PREFIX)] == _VALUE_PREFIX


def block_of(cid: Cid) -> Cid:
    """The CID of the block to read for `cid`: `cid` itself, except for a value within a block."""
    return value_place(cid)[0] if is_value(cid) else cid


def value_place(cid: Cid) -> tuple[Cid, int]:
    """The CID of the block with a value, and the value's number. For any other CID: `cid` and 0, the number
    of the whole block. Raises Malformed for a wrong CID with the codec VALUE."""
    if not is_value(cid):
        return cid, 0
    try:
        _size, at = varint.get(cid, len(_VALUE_PREFIX))
        number, at = varint.get(cid, at)
        block = decode(cid[at:])
    except (Malformed, NotACid) as exc:
        raise Malformed(f"{text(cid)} does not name a value in a block: {exc}") from exc
    if codec(block) not in (DAG_CBOR, DAG_JSON):
        raise Malformed(f"{text(cid)} does not name a value in a dag-cbor or dag-json block")
    return block, number


def too_large(name: str, cid: Cid, size: int | None = None) -> BlockTooLarge:
    """The error for a block of more than `MAX_BLOCK` bytes at the source `name`, raised before the block
    is read. `size`: its bytes, if they are known."""
    what = f"a block of {size:,} bytes" if size is not None else "a larger block"
    return BlockTooLarge(f"{name} has {text(cid)} as {what}: blocks of over {MAX_BLOCK:,} bytes are not read")


def verify(cid: Cid, block: Buffer) -> None:
    """Raises WrongBlock if `block` does not match `cid`, Unsupported for a hash that is not allowed.

    Other threads run meanwhile. Verify blocks of more than some KiB in a worker thread.
    """
    if not multihashes.matches(multihash(cid), (block,)):
        raise WrongBlock(f"{brief(cid)}: the block's bytes do not match its CID")
