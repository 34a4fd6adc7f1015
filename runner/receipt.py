"""The receipt of a run: what went in, what was read, what came out; as values and as JSON. Pure.

Format 1 is one JSON object; docs/RUNNING.md names its fields. A reader refuses what is newer, and what lacks a field.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid
from runner.errors import ReceiptRefused
from runner.limits import Limits
from runner.streams import Digest

FORMAT = 1
_KIND = "ipfsfuse-run receipt"

_SHA256 = re.compile("[0-9a-f]{64}")

ALWAYS_DIFFERS = ("device numbers", "the attributes of /")
BY_CHANCE = ("clocks", "random numbers", "NaN bits")


class GivenDir(NamedTuple):
    """A folder that the guest had by --dir; its CID where it is part of the record."""

    guest: str
    writable: bool
    cid: Cid | None


class Receipt(NamedTuple):
    guest: Cid
    name: str
    """As GUEST was given; what is no UTF-8 in it is U+FFFD here."""
    argv: Sequence[str]
    env: Sequence[tuple[str, str]]
    cwd: str | None
    limits: Limits
    dirs: Sequence[GivenDir]
    deterministic: bool
    versions: Mapping[str, str]
    read: Sequence[Cid]
    """Every block of /ipfs that the guest's reads needed, in the order of first use."""
    missing: Sequence[Cid]
    """Blocks that were asked for and that no source gave: the guest saw an error."""
    ahead: Sequence[Cid]
    """What read-ahead fetched and the guest never asked for."""
    stdin: Digest
    stdout: Digest
    stderr: Digest
    exit_code: int
    trapped: bool
    started: str
    """UTC, ISO 8601."""
    seconds: float

    @property
    def differs(self) -> tuple[str, ...]:
        """What may differ from run to run."""
        return ALWAYS_DIFFERS if self.deterministic else (*BY_CHANCE, *ALWAYS_DIFFERS)


def encode(receipt: Receipt) -> bytes:
    fields = receipt._asdict() | {
        "guest": {"cid": cids.text(receipt.guest), "name": receipt.name},
        "env": [list(each) for each in receipt.env],
        "limits": {name: value for name, value in receipt.limits._asdict().items() if value is not None},
        "dirs": [each._asdict() | {"cid": None if each.cid is None else cids.text(each.cid)} for each in receipt.dirs],
        **{name: [cids.text(each) for each in getattr(receipt, name)] for name in ("read", "missing", "ahead")},
        **{name: getattr(receipt, name)._asdict() for name in ("stdin", "stdout", "stderr")},
    }
    del fields["name"]
    whole = {"kind": _KIND, "format": FORMAT, **fields, "differs": receipt.differs}
    return json.dumps(whole, indent=1, ensure_ascii=False).encode() + b"\n"


def decode(data: bytes) -> Receipt:
    """Raises ReceiptRefused for what is no receipt, cut short, or of a newer format."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ReceiptRefused(f"the receipt is no JSON, or cut short: {exc}") from exc
    if not isinstance(fields, dict) or fields.get("kind") != _KIND:
        raise ReceiptRefused("this JSON is no receipt of ipfsfuse-run")
    if fields.get("format") != FORMAT:
        raise ReceiptRefused(f"the receipt has format {fields.get('format')!r}; this version reads format {FORMAT}: use a newer ipfsfuse")
    try:
        return _receipt(fields)
    except NotACid as exc:
        raise ReceiptRefused(f"the receipt names what is no CID: {exc}") from exc
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise ReceiptRefused(f"the receipt has no usable field {exc}") from exc


def _receipt(fields: Mapping[str, Any]) -> Receipt:
    return Receipt(
        guest=cids.parse(fields["guest"]["cid"]),
        name=_text(fields["guest"]["name"]),
        argv=_argv(fields["argv"]),
        env=[(_text(name), _text(value)) for name, value in fields["env"]],
        cwd=None if fields["cwd"] is None else _text(fields["cwd"]),
        limits=_limits(fields["limits"]),
        dirs=[_dir(each) for each in fields["dirs"]],
        deterministic=bool(fields["deterministic"]),
        versions=dict(fields["versions"]),
        read=[cids.parse(each) for each in fields["read"]],
        missing=[cids.parse(each) for each in fields["missing"]],
        ahead=[cids.parse(each) for each in fields["ahead"]],
        stdin=_digest(fields["stdin"]),
        stdout=_digest(fields["stdout"]),
        stderr=_digest(fields["stderr"]),
        exit_code=int(fields["exit_code"]),
        trapped=bool(fields["trapped"]),
        started=_text(fields["started"]),
        seconds=float(fields["seconds"]),
    )


def _argv(given: object) -> list[str]:
    if not isinstance(given, list) or not given:
        raise ValueError("argv")
    return [_text(each) for each in given]


def _text(given: object) -> str:
    """As a guest can be given it: JSON may name half of a surrogate pair, which no text has."""
    text = str(given)
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"{text!r}: it is no UTF-8") from exc
    return text


def _dir(fields: Mapping[str, Any]) -> GivenDir:
    return GivenDir(_text(fields["guest"]), bool(fields["writable"]), None if fields["cid"] is None else cids.parse(fields["cid"]))


def _limits(given: Mapping[str, Any]) -> Limits:
    if not all(type(each) in (int, float) and each >= 0 for each in given.values()):
        raise ValueError("limits")
    return Limits(**given)


def _digest(fields: Mapping[str, Any]) -> Digest:
    if not _SHA256.fullmatch(fields["sha256"]):
        raise ValueError("sha256")
    return Digest(fields["sha256"], int(fields["size"]))
