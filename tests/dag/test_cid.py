"""CIDs in all their spellings."""

import libipld
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiformats import multibase

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import DAG_PB, RAW, Cid
from ipfsfuse.errors import NotACid, Unsupported, WrongBlock
from tests.dag.blocks import cid_of, identity

V0 = "QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n"  # the dag-pb block of no bytes
V0_AS_V1 = "bafybeihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
SAMPLE = b"Decentralize everything!!!"
SAMPLES = {  # from the tests of go-multibase
    "base2": "00100010001100101011000110110010101101110011101000111001001100001011011000110100101111010011001010010"
    "000001100101011101100110010101110010011110010111010001101000011010010110111001100111001000010010000100100001",
    "base16": "f446563656e7472616c697a652065766572797468696e67212121",
    "base16upper": "F446563656E7472616C697A652065766572797468696E67212121",
    "base32": "birswgzloorzgc3djpjssazlwmvzhs5dinfxgoijbee",
    "base32upper": "BIRSWGZLOORZGC3DJPJSSAZLWMVZHS5DINFXGOIJBEE",
    "base32pad": "cirswgzloorzgc3djpjssazlwmvzhs5dinfxgoijbee======",
    "base32padupper": "CIRSWGZLOORZGC3DJPJSSAZLWMVZHS5DINFXGOIJBEE======",
    "base32hex": "v8him6pbeehp62r39f9ii0pbmclp7it38d5n6e89144",
    "base32hexupper": "V8HIM6PBEEHP62R39F9II0PBMCLP7IT38D5N6E89144",
    "base32hexpad": "t8him6pbeehp62r39f9ii0pbmclp7it38d5n6e89144======",
    "base32hexpadupper": "T8HIM6PBEEHP62R39F9II0PBMCLP7IT38D5N6E89144======",
    "base36": "km552ng4dabi4neu1oo8l4i5mndwmpc3mkukwtxy9",
    "base36upper": "KM552NG4DABI4NEU1OO8L4I5MNDWMPC3MKUKWTXY9",
    "base58btc": "z36UQrhJq9fNDS7DiAHM9YXqDHMPfr4EMArvt",
    "base58flickr": "Z36tpRGiQ9Endr7dHahm9xwQdhmoER4emaRVT",
    "base64": "mRGVjZW50cmFsaXplIGV2ZXJ5dGhpbmchISE",
    "base64url": "uRGVjZW50cmFsaXplIGV2ZXJ5dGhpbmchISE",
    "base64pad": "MRGVjZW50cmFsaXplIGV2ZXJ5dGhpbmchISE=",
    "base64urlpad": "URGVjZW50cmFsaXplIGV2ZXJ5dGhpbmchISE=",
    "base256emoji": "🚀💛✋💃✋😻😈🥺🤤🍀🌟💐✋😅✋💦✋🥺🏃😈😴🌟😻😝👏👏👏",
}
BASES = sorted({base.name for base in multibase.table()} - {"identity", "base256emoji"})


def spell(cid: bytes, base: str) -> str:
    return libipld.encode_multibase("🚀", cid) if base == "base256emoji" else multibase.encode(cid, base)


@pytest.mark.parametrize("base", [*BASES, "base256emoji"])
def test_version_1_is_read_in_every_multibase(base: str) -> None:
    """Except `identity`: its prefix is NUL, and a file name or an argument can't hold that."""
    for cid in (cid_of(b"x"), cid_of(b"y", RAW), identity(b"z"), cids.make(0x0129, b"\x13\x40" + bytes(64))):
        assert cids.parse(spell(cid, base)) == cid


@pytest.mark.parametrize("base", SAMPLES)
def test_multibases_spell_as_in_go(base: str) -> None:
    assert cids._decode_text(SAMPLES[base]) == SAMPLE
    assert spell(SAMPLE, base) == SAMPLES[base]


def test_version_0_and_version_1_of_a_cid_have_one_canonical_form() -> None:
    cid = cids.parse(V0)
    assert cid[:2] == b"\x12\x20"
    assert cids.text(cid) == V0
    assert cids.canonical(cid) == cids.parse(V0_AS_V1)
    assert cids.canonical(cids.parse(V0_AS_V1)) == cids.parse(V0_AS_V1)
    assert cids.multihash(cid) == cids.multihash(cids.parse(V0_AS_V1)) == cid
    assert cids.codec(cid) == cids.codec(cids.parse(V0_AS_V1)) == DAG_PB
    cids.verify(cid, b"")


NOT_CIDS = [
    "",
    "b",
    "Qm",
    "a",
    ".git",
    "autorun.inf",
    "README.md",
    "🚀",
    "x" * 5000,
    V0[:-1],
    V0[:-1] + "0",  # not a digit of base58
    V0 + "a",
    "z" + V0,  # version 0 has no multibase
    multibase.encode(cids.parse(V0), "base32"),
    V0_AS_V1[:-1],
    V0_AS_V1[:-1] + "b",
    V0_AS_V1 + "a",
    "b" + V0_AS_V1[1:].upper(),
    V0_AS_V1[:-1] + "v",  # bits left over that are not zero
    V0_AS_V1[:20] + "1" + V0_AS_V1[21:],
    multibase.encode(b"\x02" + cid_of(b"")[1:], "base32"),
    multibase.encode(cid_of(b"")[:-1], "base32"),
    multibase.encode(b"\x01\x55", "base16"),
    "f01551220zz",
    "k" + "é" * 20,
    "\udcff\udcfe",
    "b\nafy",
]


@pytest.mark.parametrize("text", NOT_CIDS, ids=range(len(NOT_CIDS)))
def test_text_that_is_not_a_cid_is_refused_in_one_line_that_shows_it(text: str) -> None:
    with pytest.raises(NotACid) as refused:
        cids.parse(text)
    message = str(refused.value)
    assert "\n" not in message
    assert repr(text[:80]) in message
    assert len(message) < 400


@given(
    st.text(max_size=80)
    | st.builds(str.__add__, st.sampled_from("01789fFbBcCvVtThkKzZmMuUp🚀R\0"), st.text(max_size=120))
)
def test_any_text_is_a_cid_or_refused(text: str) -> None:
    try:
        assert cids.decode(cids.parse(text)) == cids.parse(text)
    except NotACid:
        pass


@given(st.binary(max_size=60))
def test_any_bytes_are_a_cid_or_refused_and_decode_prefix_agrees(data: bytes) -> None:
    try:
        cid = cids.decode(data)
    except NotACid:
        return
    assert cids.decode_prefix(b"??" + data + b"more", 2) == (cid, 2 + len(data))
    assert cids.parse(cids.text(cid)) == cid


@pytest.mark.parametrize(
    "data", [b"\x12\x20" + bytes(31), b"\x01\x55\x12\x20" + bytes(31), b"\x01", b"\x01\x55\x80", b""]
)
def test_a_prefix_that_is_cut_short_is_refused(data: bytes) -> None:
    with pytest.raises(NotACid):
        cids.decode_prefix(data)


def test_a_block_is_checked_against_its_cid() -> None:
    cids.verify(cid_of(b"x", RAW), b"x")
    with pytest.raises(WrongBlock, match=cids.text(cid_of(b"x", RAW))):
        cids.verify(cid_of(b"x", RAW), b"y")
    with pytest.raises(WrongBlock, match=r"a CID of 10\d bytes"):
        cids.verify(identity(b"x" * 100), b"y")
    with pytest.raises(Unsupported, match="0xd5"):
        cids.verify(Cid(b"\x01\x55\xd5\x01\x10" + bytes(16)), b"")


def test_an_identity_cid_carries_its_block() -> None:
    assert cids.inline_block(identity(b"abc")) == b"abc"
    assert cids.inline_block(identity(b"")) == b""
    assert cids.inline_block(cid_of(b"abc")) is None
    assert cids.inline_block(cids.parse(V0)) is None
    with pytest.raises(Unsupported, match="129 bytes"):
        cids.inline_block(identity(b"x" * 129))
