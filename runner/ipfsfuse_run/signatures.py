"""The signature of a receipt: a DSSE envelope over an in-toto statement, signed with an Ed25519 key.

The statement's subjects are standard output, standard error and each file of the results, by SHA-256, and the
folder of results, by its CID. Its predicate is the receipt. Sources: DSSE protocol 1.0
(https://github.com/secure-systems-lab/dsse), in-toto attestation statement v1.
"""

import base64
import hashlib
import json
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

from ipfsfuse import extras
from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import UsageError
from ipfsfuse_run.errors import ReceiptRefused
from ipfsfuse_run.files import open_to_read
from ipfsfuse_run.receipts import OUT, STDERR, STDOUT, Receipt

with extras.optional("sign"):
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:ipfsfuse:receipt:v2"
CID_DIGEST = "ipfsCid"
"""Our own name for a digest that is a CID."""
MAX_ENVELOPE = 192 << 20
"""Bytes of an envelope, which holds a receipt in base64."""
_MAX_KEY = 64 << 10
_MAX_SIGNATURES = 16


def private_key(path: str) -> Ed25519PrivateKey:
    """Reads an Ed25519 key: a PEM of OpenSSL's or OpenSSH's without a passphrase. Raises UsageError."""
    data = _read(path, "--sign")
    load = (
        serialization.load_ssh_private_key
        if b"BEGIN OPENSSH PRIVATE KEY" in data
        else serialization.load_pem_private_key
    )
    try:
        key = load(data, password=None)
    except (TypeError, ValueError, UnsupportedAlgorithm) as exc:
        if isinstance(exc, TypeError) or b"ENCRYPTED" in data or "password" in str(exc).lower():
            raise UsageError(f"--sign {path}: the key has a passphrase; give one that has none") from exc
        raise UsageError(f"--sign {path} is not a private key in a PEM of OpenSSL's or OpenSSH's") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"--sign {path} is not an Ed25519 key")
    return key


def public_key(path: str) -> Ed25519PublicKey:
    """Reads an Ed25519 key: a PEM of OpenSSL's or a line of OpenSSH's. Raises UsageError."""
    data = _read(path, "--key")
    try:
        key = (
            serialization.load_ssh_public_key(data.strip())
            if data.startswith(b"ssh-")
            else serialization.load_pem_public_key(data)
        )
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise UsageError(
            f"--key {path} is not a public key in a PEM of OpenSSL's or a line of OpenSSH's"
        ) from exc
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"--key {path} is not an Ed25519 key")
    return key


def _read(path: str, option: str) -> bytes:
    try:
        with open_to_read(path) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{option} {path} is not a file")
            return file.read(_MAX_KEY)
    except OSError as exc:
        raise UsageError(f"{option} {path} can't be read: {exc.strerror}") from exc


def fingerprint(key: Ed25519PublicKey) -> str:
    """The fingerprint, as `ssh-keygen -l` shows it."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def signed(
    key: Ed25519PrivateKey, receipt: Receipt, encoded: bytes, files: Sequence[tuple[str, str]]
) -> bytes:
    """The envelope, as JSON. `encoded` is the receipt's bytes; `files` are the results' paths with their
    SHA-256."""
    payload = json.dumps(statement(receipt, encoded, files), ensure_ascii=False).encode()
    signature = {
        "keyid": fingerprint(key.public_key()),
        "sig": base64.b64encode(key.sign(_encoding(payload))).decode(),
    }
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [signature],
    }
    return json.dumps(envelope, indent=1).encode() + b"\n"


def statement(receipt: Receipt, encoded: bytes, files: Sequence[tuple[str, str]]) -> dict[str, Any]:
    subjects = [
        {"name": STDOUT, "digest": {"sha256": receipt.stdout.sha256}},
        {"name": STDERR, "digest": {"sha256": receipt.stderr.sha256}},
        *({"name": f"{OUT}/{path}", "digest": {"sha256": sha256}} for path, sha256 in sorted(files)),
    ]
    if receipt.out is not None:
        subjects.append({"name": OUT, "digest": {CID_DIGEST: cids.text(receipt.out)}})
    return {
        "_type": STATEMENT,
        "subject": subjects,
        "predicateType": PREDICATE,
        "predicate": json.loads(encoded),
    }


def _encoding(payload: bytes) -> bytes:
    """What is signed: DSSE's PAE."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def check(
    envelope: bytes,
    key: Ed25519PublicKey,
    receipt: Receipt,
    encoded: bytes,
    files: Callable[[], Sequence[tuple[str, str]]],
) -> None:
    """Raises ReceiptRefused unless `key` signed exactly this receipt and these results."""
    name = fingerprint(key)
    payload, signatures = _parsed(envelope)
    for _name, signature in signatures:
        try:
            key.verify(signature, _encoding(payload))
            break
        except InvalidSignature:
            continue
    else:
        raise ReceiptRefused(f"the receipt is not signed by {name}")
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError) as exc:
        raise ReceiptRefused("its signature is of something that is not JSON") from exc
    wanted = json.dumps(statement(receipt, encoded, files()), sort_keys=True)
    if json.dumps(found, sort_keys=True) != wanted:
        raise ReceiptRefused(f"the signature of {name} is of another receipt, or of other results")


def signers(envelope: bytes) -> list[str]:
    """The fingerprints that an envelope names, unverified. Raises ReceiptRefused."""
    return [name for name, _signature in _parsed(envelope)[1]]


def _parsed(envelope: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """The payload, and the signatures with the names of their keys. Raises ReceiptRefused."""
    try:
        fields = json.loads(envelope)
        listed = fields["signatures"]
        if fields["payloadType"] == PAYLOAD_TYPE and 0 < len(listed) <= _MAX_SIGNATURES:
            return base64.b64decode(fields["payload"], validate=True), [
                (str(each.get("keyid"))[:100], base64.b64decode(each["sig"], validate=True))
                for each in listed
            ]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as exc:
        raise ReceiptRefused("its signature is not a DSSE envelope") from exc
    raise ReceiptRefused("its signature is not a DSSE envelope of an in-toto statement")
