"""Every allowed hash function, with published vectors, and the limits of boxo's verifcid."""

import hashlib

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag import varint
from ipfsfuse.errors import NotACid, Unsupported, WrongBlock

BLAKE3 = (
    "04e0bb39f30b1a3feb89f536c93be15055482df748674b00d26e5a75777702e9791074b7511b59d31c71c62f5a745689fa6c9497f68bdf1061fe07f518d410c0"
    "b0c27f41b3cf083f8a7fdc67a877e21790515762a754a45dcb8a356722698a7af5ed2bb608983d5aa75d4d61691ef132efe8631ce0afc15553a08fffc60ee936"
)
VECTORS = [  # multihashes, most of them from the tests of go-multihash
    (b"foo", "0003666f6f"),
    (b"", "0000"),
    (b"foo", "11140beec7b5ea3f0fdbc95d0dd47f3c5bc275da8a33"),
    (b"foo", "12202c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"),
    (b"foo", "121f2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7"),
    (
        b"foo",
        "1340f7fbba6e0636f890e56fbbf3283e524c6fa3204ae298382d624741d0dc6638326e282c41be5e4254d8820772c5518a2c5a8c0c7f7eda19594a7eb539453e1ed7",
    ),
    (b"foo", "1320f7fbba6e0636f890e56fbbf3283e524c6fa3204ae298382d624741d0dc663832"),
    (
        b"foo",
        "14404bca2b137edc580fe50a88983ef860ebaca36c857b1f492839d6d7392452a63c82cbebc68e3b70a2a1480b4bb5d437a7cba6ecf9d89f9ff3ccd14cd6146ea7e7",
    ),
    (
        b"beep boop",
        "153075a9cff1bcfbe8a7025aa225dd558fb002769d4bf3b67d2aaf180459172208bea989804aefccf060b583e629e5f41e8d",
    ),
    (b"beep boop", "1620828705da60284b39de02e3599d1f39e6c1df001f5dbf63c9ec2d2c91a95a427f"),
    (b"beep boop", "171c0da73a89549018df311c0a63250e008f7be357f93ba4e582aaea32b8"),
    (
        b"foo",
        "19401af97f7818a28edfdfce5ec66dbdc7e871813816d7d585fe1f12475ded5b6502b7723b74e2ee36f2651a10a8eaca72aa9148c3c761aaceac8f6d6cc64381ed39",
    ),
    (b"", "1a1cf71837502ba8e10837bdd8d365adb85591895602fc552b48b7390abd"),
    (b"foo", "1b2041b1a0649752af1b28b3dc29a1556eee781e4a4c3a1f7f53f90fa834de098c4d"),
    (
        b"",
        "1c302c23146a63a29acf99e73b88f8c24eaa7dc60aa771780ccc006afbfa8fe2479b2dd2b21362337441ac12b515911957ff",
    ),
    (
        b"beep boop",
        "1d40e161c54798f78eba3404ac5e7e12d27555b7b810e7fd0db3f25ffa0c785c438331b0fbb6156215f69edf403c642e5280f4521da9bd767296ec81f05100852e78",
    ),
    (b"foo", "1e20" + BLAKE3[:64]),
    (b"foo", "1e40" + BLAKE3[:128]),
    (b"foo", "1e8001" + BLAKE3),
    (b"foo", "5620c7ade88fc7a21498a6a5e5c385e1f68bed822b72aa63c4a9a48a02c2466ee29e"),
    (b"foo", "94e40214983ceba2afea8694cc933336b27b907f90c53a88"),
    (b"foo", "a0e40220b8fe9f7f6255a6fa08f668ab632a8d081ad87983c77cd274e48ce450f0b349fd"),
    (
        b"foo",
        "ade4022dca82ab956d5885e3f5db10cca94182f01a6ca2c47f9f4228497dcc9f4a0121c725468b852a71ec21fcbeb725df",
    ),
    (
        b"foo",
        "b0e40230e629ee880953d32c8877e479e3b4cb0a4c9d5805e2b34c675b5a5863c4ad7d64bb2a9b8257fac9d82d289b3d39eb9cc2",
    ),
    (
        b"foo",
        "c0e40240ca002330e69d3e6b84a46a56a6533fd79d51d97a3bb7cad6c2ff43b354185d6dc1e723fb3db4ae0737e120378424c714bb982d9dc5bbd7a0ab318240ddd18f8d",
    ),
    (b"foo", "e0e4022008d6cad88075de8f192db097573d0e829411cd91eb6ec65e8fc16c017edfdb74"),
]


def verify(multihash: bytes, block: bytes | memoryview) -> None:
    cids.verify(cids.make(cids.RAW, multihash), block)


@pytest.mark.parametrize(("data", "multihash"), VECTORS, ids=[vector[1][:10] for vector in VECTORS])
def test_each_function_accepts_its_block_and_refuses_another(data: bytes, multihash: str) -> None:
    wanted = bytes.fromhex(multihash)
    verify(wanted, data)
    verify(wanted, memoryview(data))
    assert multihashes.matches(wanted, (data[:1], bytearray(data[1:]), b""))
    with pytest.raises(WrongBlock, match=": the block"):
        verify(wanted, data + b"x")
    if len(wanted) > 2:
        with pytest.raises(WrongBlock):
            verify(wanted[:-1] + bytes([wanted[-1] ^ 1]), data)


def test_the_vectors_cover_every_function() -> None:
    families = {
        0x12: 0x12,
        **{0xB200 + n: 0xB200 for n in range(1, 65)},
        **{0xB240 + n: 0xB240 for n in range(1, 33)},
    }
    seen = {multihashes.split(bytes.fromhex(multihash))[0] for _, multihash in VECTORS}
    assert {families.get(code, code) for code in seen} == {
        families.get(code, code) for code in (*multihashes._FUNCTIONS, multihashes.IDENTITY)
    }


def multihash(code: int, size: int) -> bytes:
    return varint.put(code) + varint.put(size) + bytes(size)


@pytest.mark.parametrize(
    "code", [0x11, 0x12, 0x13, 0x14, 0x17, 0x19, 0x1B, 0x1E, 0x56, 0xB220, 0xB240, 0xB260]
)
def test_digests_of_20_to_128_bytes_are_allowed(code: int) -> None:
    multihashes.check_allowed(multihash(code, 20))
    multihashes.check_allowed(multihash(code, 128))
    for size in (0, 19, 129, 1000):
        with pytest.raises(Unsupported, match=f"digest of {size} bytes"):
            multihashes.check_allowed(multihash(code, size))
        with pytest.raises(Unsupported):
            verify(multihash(code, size), b"")


def test_a_digest_that_is_longer_than_its_function_gives_matches_no_block() -> None:
    with pytest.raises(WrongBlock):
        verify(
            varint.put(0x11) + b"\x15" + bytes.fromhex("0beec7b5ea3f0fdbc95d0dd47f3c5bc275da8a33") + b"\0",
            b"foo",
        )


@pytest.mark.parametrize(
    "code", [0xD5, 0x22, 0x18, 0x20, 0x1012, 0xB201, 0xB213, 0xB241, 0xB253, 0xB301, 0x1000]
)
def test_other_functions_are_refused_by_name(code: int) -> None:
    with pytest.raises(Unsupported, match=f"0x{code:x}"):
        multihashes.check_allowed(multihash(code, 32))


def test_every_blake2_function_of_at_least_20_bytes_is_allowed_and_makes_digests_of_its_size() -> None:
    for first, longest, function in ((0xB200, 64, hashlib.blake2b), (0xB240, 32, hashlib.blake2s)):
        for size in range(20, longest + 1):
            digest = function(b"foo", digest_size=size).digest()
            wanted = varint.put(first + size) + bytes([size]) + digest
            multihashes.check_allowed(wanted)
            verify(wanted, b"foo")
            with pytest.raises(WrongBlock):
                verify(wanted, b"fou")


def test_identity_carries_up_to_128_bytes() -> None:
    assert cids.inline_block(cids.make(cids.RAW, b"\x00\x03foo")) == b"foo"
    assert cids.inline_block(cids.make(cids.RAW, multihash(0, 128))) == bytes(128)
    assert cids.inline_block(cids.make(cids.RAW, multihash(0x12, 32))) is None
    with pytest.raises(Unsupported, match="129 bytes"):
        cids.inline_block(cids.make(cids.RAW, multihash(0, 129)))
    with pytest.raises(Unsupported):
        verify(multihash(0, 129), bytes(129))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x12",
        b"\x12\x20",
        b"\x12\x20" + bytes(31),
        b"\x12\x20" + bytes(33),
        b"\x92\x00\x20" + bytes(32),
        b"\xff" * 10,
    ],
)
def test_bytes_that_are_not_a_multihash_are_refused(data: bytes) -> None:
    with pytest.raises(NotACid):
        multihashes.split(data)
