"""IPNS names and records: decoding and verification, as the specification says. Pure functions.

Source: https://specs.ipfs.tech/ipns/ipns-record/ and, for keys, the libp2p peer-id specification.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Final

import libipld

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag import protobuf
from ipfsfuse.errors import Malformed, NotACid, WrongRecord
from ipfsfuse.extras import optional

with optional("names"):
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MAX_RECORD: Final = 10 * 1024
"""Bytes of a record (section "Record Size Limit")."""
MAX_NAME_TEXT: Final = 253
"""Characters of the longest domain. Names of keys are shorter."""
SIGNATURE_PREFIX: Final = b"ipns-signature:"
RSA, ED25519, SECP256K1, ECDSA = range(4)
RSA_BITS: Final = range(2048, 8192 + 1)
"""The key sizes that go-libp2p accepts: verifying with a larger key takes long."""
ECDSA_CURVES: Final = (ec.SECP224R1, ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
NANOSECONDS: Final = 10**9

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?(?:Z|([+-])(\d\d):(\d\d))",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class KeyName:
    """The multihash of a public key. An IPNS record is verified with that key."""

    multihash: bytes

    def __str__(self) -> str:
        """The usual spelling, a CID in base36 (`k51...`, `k2k4...`)."""
        return libipld.encode_multibase("k", cids.make(cids.LIBP2P_KEY, self.multihash))


@dataclass(frozen=True, slots=True)
class DomainName:
    """A domain with a DNSLink record, in lower case, in its ASCII form."""

    domain: str

    def __str__(self) -> str:
        return self.domain


Name = KeyName | DomainName


def parse_name(text: str) -> Name | None:
    """Parses a name: `k51...`, `k2k4...` or another CID of a key; `12D3Koo...` or `Qm...`; or a domain. None
    for anything else."""
    if not 0 < len(text) <= MAX_NAME_TEXT:
        return None
    return _parse_domain(text) if "." in text else _parse_key(text)


def _parse_key(text: str) -> KeyName | None:
    try:
        if text.startswith(("1", "Qm")):  # a multihash alone
            multihash = libipld.decode_multibase("z" + text)[1]
        else:
            cid = cids.parse(text)
            if cids.codec(cid) != cids.LIBP2P_KEY:
                return None
            multihash = cids.multihash(cid)
        code, digest = multihashes.split(multihash)
    except (NotACid, ValueError):
        return None
    if code == multihashes.IDENTITY:
        return KeyName(multihash) if len(digest) <= multihashes.MAX_DIGEST else None
    return KeyName(multihash) if code == multihashes.SHA2_256 and len(digest) == 32 else None


def _parse_domain(text: str) -> DomainName | None:
    try:
        domain = text.lower() if text.isascii() else text.encode("idna").decode().lower()
    except UnicodeError:
        return None
    domain = domain.removesuffix(".")
    labels = domain.split(".")
    if len(labels) < 2 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdecimal():
        return None
    return DomainName(domain)


@dataclass(frozen=True, slots=True)
class Record:
    """A record with a verified signature. It may have expired."""

    name: KeyName
    value: str
    """A path, as the record's owner wrote it: `/ipfs/CID/...` or `/ipns/NAME/...`."""
    sequence: int
    validity: int
    """When it expires, in nanoseconds since 1970."""
    ttl: int
    """How long it may be used before the sources are asked again, in nanoseconds."""
    data: bytes
    """The encoded record."""

    @property
    def rank(self) -> tuple[int, int, bytes]:
        """Of two records of one name, the one with the higher rank is newer, as in boxo's `Select`."""
        return self.sequence, self.validity, self.data


def verify(name: KeyName, data: bytes) -> Record:
    """Decodes a record of `name` and verifies its signature (section "Record Verification", without the last
    step, the time). Raises WrongRecord."""
    if len(data) > MAX_RECORD:
        raise WrongRecord(f"{name}: a record of {len(data):,} bytes; {MAX_RECORD:,} are the most")
    try:
        return _verify(name, data)
    except (Malformed, NotACid) as exc:
        raise WrongRecord(f"{name}: the record is malformed: {exc}") from exc


def _verify(name: KeyName, data: bytes) -> Record:
    fields = _fields(data)
    signature, signed = fields.get(8, b""), fields.get(9, b"")
    if not isinstance(signature, bytes) or not isinstance(signed, bytes) or not signature or not signed:
        raise WrongRecord(f"{name}: the record has no signature of version 2")
    key = fields.get(7) or _inline_key(name)
    if not isinstance(key, bytes) or not multihashes.matches(name.multihash, (key,)):
        raise WrongRecord(f"{name}: the record's key is another one")
    if not _is_signed(key, signature, SIGNATURE_PREFIX + signed):
        raise WrongRecord(f"{name}: the record's signature is wrong")
    return _decode(name, data, signed, fields)


def _fields(data: bytes) -> dict[int, int | bytes]:
    """The fields 1 to 9 of IpnsEntry, by number. Other fields are ignored; the last of a repeated field
    counts."""
    fields: dict[int, int | bytes] = {}
    at, end = 0, len(data)
    while at < end:
        number, wire, at = protobuf.tag(data, at, end)
        wanted = {3: protobuf.VARINT, 5: protobuf.VARINT, 6: protobuf.VARINT}.get(number, protobuf.BYTES)
        if not 1 <= number <= 9:
            at = protobuf.skip(data, at, end, wire)
        elif wire != wanted:
            raise Malformed(f"protobuf: field {number} has wire type {wire}")
        elif wire == protobuf.VARINT:
            fields[number], at = protobuf.varint(data, at, end)
        else:
            start, at = protobuf.span(data, at, end)
            fields[number] = data[start:at]
    return fields


def _inline_key(name: KeyName) -> bytes | None:
    code, digest = multihashes.split(name.multihash)
    return digest if code == multihashes.IDENTITY else None


def _decode(name: KeyName, data: bytes, signed: bytes, fields: dict[int, int | bytes]) -> Record:
    try:
        values = libipld.decode_dag_cbor(signed)
    except (ValueError, RecursionError) as exc:
        raise Malformed(f"its data is not dag-cbor: {exc}") from exc
    if not isinstance(values, dict):
        raise Malformed("its data is not a map")
    value, validity = values.get("Value"), values.get("Validity")
    kind, sequence, ttl = values.get("ValidityType"), values.get("Sequence"), values.get("TTL")
    if not isinstance(value, bytes) or not isinstance(validity, bytes):
        raise Malformed("its value or its validity is missing")
    for number in (kind, sequence, ttl):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 64:
            raise Malformed("its validity type, sequence or TTL is missing or is not an unsigned integer")
    assert isinstance(sequence, int)
    assert isinstance(ttl, int)
    if kind != 0:
        raise Malformed(f"validity type {kind} is not known")
    if fields.get(1) or fields.get(2):  # it also has the fields of version 1, for older readers
        unsigned = (
            fields.get(1, b""),
            fields.get(4, b""),
            fields.get(3, 0),
            fields.get(5, 0),
            fields.get(6, 0),
        )
        if unsigned != (value, validity, kind, sequence, ttl):
            raise WrongRecord(f"{name}: the record's unsigned fields differ from the signed ones")
    try:
        text = value.decode()
    except UnicodeDecodeError as exc:
        raise Malformed("its value is not UTF-8") from exc
    return Record(name, text, sequence, _nanoseconds(validity), ttl, data)


def _nanoseconds(validity: bytes) -> int:
    """Nanoseconds since 1970 of a time in RFC 3339."""
    found = _TIME.fullmatch(validity.decode("ascii", "replace"))
    if found is None:
        raise Malformed("its validity is not a time of RFC 3339")
    day, clock, fraction, sign, hours, minutes = found.groups()
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0)) * (-1 if sign == "-" else 1)
    try:
        moment = datetime.fromisoformat(f"{day}T{clock}").replace(tzinfo=timezone(offset))
    except ValueError as exc:
        raise Malformed(f"its validity is not a time: {exc}") from exc
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86400 + since.seconds) * NANOSECONDS + int((fraction or "").ljust(9, "0"))


# -- keys ----------------------------------------------------------------------------------------------------


def _is_signed(key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the owner of the serialized PublicKey `key` signed `message`. Raises Malformed."""
    kind, data = _public_key(key)
    try:
        if kind == ED25519:
            Ed25519PublicKey.from_public_bytes(data).verify(signature, message)
        elif kind == SECP256K1:
            point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), data)
            point.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        else:
            loaded = serialization.load_der_public_key(data)
            if kind == RSA and isinstance(loaded, rsa.RSAPublicKey) and loaded.key_size in RSA_BITS:
                loaded.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
            elif (
                kind == ECDSA
                and isinstance(loaded, ec.EllipticCurvePublicKey)
                and isinstance(loaded.curve, ECDSA_CURVES)
            ):
                loaded.verify(signature, message, ec.ECDSA(hashes.SHA256()))
            else:
                raise Malformed("its key is not of the kind that it says, or of a size that is not allowed")
    except InvalidSignature:
        return False
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise Malformed(f"its key can't be read: {exc}") from exc
    return True


def _public_key(key: bytes) -> tuple[int, bytes]:
    """(type, data) of a serialized PublicKey (section "Key Serialization Format")."""
    kind, data = -1, b""
    at, end = 0, len(key)
    while at < end:
        number, wire, at = protobuf.tag(key, at, end)
        if (number, wire) == (1, protobuf.VARINT):
            kind, at = protobuf.varint(key, at, end)
        elif (number, wire) == (2, protobuf.BYTES):
            start, at = protobuf.span(key, at, end)
            data = key[start:at]
        else:
            at = protobuf.skip(key, at, end, wire)
    if kind not in (RSA, ED25519, SECP256K1, ECDSA):
        raise Malformed(f"keys of type {kind} are not known")
    return kind, data
