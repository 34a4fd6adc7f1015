"""Makes IPNS records for tests. A server on loopback sends them, or other bytes that a test chooses."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from typing import Any

import libipld
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ipfsfuse.dag import varint
from ipfsfuse.sources.names import record as records
from ipfsfuse.sources.names.record import KeyName
from tests.sources.listening import HttpAnswering

PrivateKey = Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
DAY = 86400.0


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint.put(number << 3) + varint.put(value)
    return varint.put(number << 3 | 2) + varint.put(len(value)) + value


def public_key(key: PrivateKey) -> bytes:
    """The serialized PublicKey."""
    public = key.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        kind, data = records.RSA, _der(public)
    elif isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256K1):
        kind = records.SECP256K1
        data = public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    elif isinstance(public, ec.EllipticCurvePublicKey):
        kind, data = records.ECDSA, _der(public)
    else:
        kind = records.ED25519
        data = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return field(1, kind) + field(2, data)


def _der(public: Any) -> bytes:
    return bytes(
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def name_of(key: PrivateKey) -> KeyName:
    serialized = public_key(key)
    return KeyName(
        bytes([0, len(serialized)]) + serialized
        if len(serialized) <= 42
        else b"\x12\x20" + hashlib.sha256(serialized).digest()
    )


def sign(key: PrivateKey, message: bytes) -> bytes:
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(message, padding.PKCS1v15(), hashes.SHA256())
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(message, ec.ECDSA(hashes.SHA256()))
    return key.sign(message)


def make(
    key: PrivateKey,
    value: str,
    sequence: int = 0,
    *,
    valid: float = DAY,
    ttl: float = 60.0,
    more: Mapping[str, object] | None = None,
    without: str = "",
    validity: bytes | None = None,
) -> bytes:
    """A record of version 2 that is valid for `valid` seconds. `more`: further fields of its data. `without`:
    a field that it lacks."""
    until = datetime.fromtimestamp(time.time() + valid, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    values: dict[str, object] = {
        "Value": value.encode(),
        "Validity": validity if validity is not None else until.encode(),
        "ValidityType": 0,
        "Sequence": sequence,
        "TTL": int(ttl * 1e9),
        **(more or {}),
    }
    values.pop(without, None)
    return signed(key, libipld.encode_dag_cbor(values))


def signed(key: PrivateKey, data: bytes) -> bytes:
    serialized = public_key(key)
    inlined = field(7, serialized) if len(serialized) > 42 else b""
    return inlined + field(8, sign(key, records.SIGNATURE_PREFIX + data)) + field(9, data)


class NameServer(HttpAnswering):
    """Answers `/ipns/NAME?format=ipns-record` and `/routing/v1/ipns/NAME` with the record in `records`."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, bytes] = {}
        self.content_type = "application/vnd.ipfs.ipns-record"
        self.stalled = False
        self.asked: Counter[str] = Counter()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.partition("?")[0].rpartition("/")[2]
        self.asked[name] += 1
        if self.stalled:
            self.ended.wait()
            return
        data = self.records.get(name)
        request.send_response(200 if data is not None else 404)
        request.send_header("Content-Type", self.content_type)
        request.send_header("Content-Length", str(len(data or b"")))
        request.end_headers()
        request.wfile.write(data or b"")


@pytest.fixture
def server() -> Iterator[NameServer]:
    with NameServer().serving() as server:
        yield server
