"""Multihashes: the allowed functions, and the check of bytes against a multihash.

The allowed functions and lengths are those of boxo's `verifcid` (digests of 20 to 128 bytes, identity of at
most 128). A digest may be a prefix of its function's digest, as in go-multihash. Pure functions.
"""

import hashlib
from collections.abc import Callable, Sequence

from ipfsfuse import extras
from ipfsfuse.dag import varint
from ipfsfuse.errors import Malformed, NotACid, Unsupported
from ipfsfuse.structures import Buffer

IDENTITY = 0x00
SHA2_256 = 0x12
SHA2_256_PREFIX = b"\x12\x20"
"""The start of nearly every multihash: SHA-256, and the length of its digest."""
MIN_DIGEST = 20
MAX_DIGEST = 128

Hash = Callable[[Buffer, int], bytes]
"""(data, wanted length in bytes) -> digest, of at least that length if the function can make it."""


def _lib(name: str) -> Hash:
    return lambda data, _length: hashlib.new(name, data, usedforsecurity=False).digest()


def _shake256(data: Buffer, length: int) -> bytes:
    return hashlib.shake_256(data).digest(max(length, 64))


def _keccak(bits: int) -> Hash:
    def digest(data: Buffer, _length: int) -> bytes:
        from Crypto.Hash import keccak  # rare, and 20 ms to import

        return keccak.new(digest_bits=bits, data=bytes(data)).digest()

    return digest


def _blake2(kind: type[hashlib.blake2b] | type[hashlib.blake2s], size: int) -> Hash:
    return lambda data, _length: kind(data, digest_size=size).digest()


def _blake3(data: Buffer, length: int) -> bytes:
    from blake3 import blake3  # rare

    return blake3(data).digest(length=max(length, 32))


def _double_sha2(data: Buffer, _length: int) -> bytes:
    return hashlib.sha256(hashlib.sha256(data).digest()).digest()


_KECCAK: dict[int, tuple[str, Hash]] = {
    0x1A: ("keccak-224", _keccak(224)),
    0x1B: ("keccak-256", _keccak(256)),
    0x1C: ("keccak-384", _keccak(384)),
    0x1D: ("keccak-512", _keccak(512)),
}
_FUNCTIONS: dict[int, tuple[str, Hash]] = {
    0x11: ("sha1", _lib("sha1")),
    SHA2_256: ("sha2-256", _lib("sha256")),
    0x13: ("sha2-512", _lib("sha512")),
    0x14: ("sha3-512", _lib("sha3_512")),
    0x15: ("sha3-384", _lib("sha3_384")),
    0x16: ("sha3-256", _lib("sha3_256")),
    0x17: ("sha3-224", _lib("sha3_224")),
    0x19: ("shake-256", _shake256),
    **_KECCAK,
    0x1E: ("blake3", _blake3),
    0x56: ("dbl-sha2-256", _double_sha2),
    **{0xB200 + n: (f"blake2b-{8 * n}", _blake2(hashlib.blake2b, n)) for n in range(20, 65)},
    **{0xB240 + n: (f"blake2s-{8 * n}", _blake2(hashlib.blake2s, n)) for n in range(20, 33)},
}


def split(multihash: bytes) -> tuple[int, bytes]:
    """(code, digest) of a multihash. Raises NotACid if its length is wrong."""
    if len(multihash) == 34 and multihash[0] == SHA2_256 and multihash[1] == 32:
        return SHA2_256, multihash[2:]
    try:
        code, at = varint.get(multihash, 0)
        length, at = varint.get(multihash, at)
    except Malformed as exc:
        raise NotACid(f"not a multihash: {exc}") from exc
    if at + length != len(multihash):
        raise NotACid("a multihash whose length differs from what it states")
    return code, multihash[at:]


def check_allowed(multihash: bytes) -> None:
    """Raises Unsupported, with the function's name, for a multihash that boxo's `verifcid` would refuse."""
    if len(multihash) == 34 and multihash[0] == SHA2_256 and multihash[1] == 32:
        return
    code, digest = split(multihash)
    if code == IDENTITY:
        if len(digest) > MAX_DIGEST:
            raise Unsupported(f"an identity CID of {len(digest)} bytes: at most {MAX_DIGEST} are allowed")
        return
    if code not in _FUNCTIONS:
        raise Unsupported(f"hash function 0x{code:x} is not allowed")
    if code in _KECCAK:
        extras.require("keccak")  # fails before anything is fetched
    if not MIN_DIGEST <= len(digest) <= MAX_DIGEST:
        raise Unsupported(
            f"a {_FUNCTIONS[code][0]} digest of {len(digest)} bytes: {MIN_DIGEST} to {MAX_DIGEST} are allowed"
        )


def matches(multihash: bytes, parts: Sequence[Buffer]) -> bool:
    """Whether the bytes of all `parts` in order hash to `multihash`. Raises Unsupported if the hash is not
    allowed."""
    # the usual case: nothing is copied
    if len(multihash) == 34 and multihash[0] == SHA2_256 and multihash[1] == 32:
        hasher = hashlib.sha256()
        for part in parts:
            hasher.update(part)
        return hasher.digest() == multihash[2:]
    check_allowed(multihash)
    code, digest = split(multihash)
    whole = parts[0] if len(parts) == 1 else b"".join(parts)
    found = bytes(whole) if code == IDENTITY else _FUNCTIONS[code][1](whole, len(digest))[: len(digest)]
    return found == digest
