"""The receipt of a run: what went in, what was read, what came out; as values and as JSON. Pure.

Format 1 is one JSON object; docs/RUNNING.md names its fields. The reader is strict, because a receipt may
come from anyone: each field has its type and its bounds, no key stands there twice, numbers are finite, and
the limits pass the same check as the command line's. What is newer is refused.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid, UsageError
from ipfsfuse_run import limits
from ipfsfuse_run.errors import ReceiptRefused
from ipfsfuse_run.guest import TRAPPED
from ipfsfuse_run.limits import Limits
from ipfsfuse_run.streams import Digest

FORMAT = 1
_KIND = "ipfsfuse-run receipt"

_SHA256 = re.compile("[0-9a-f]{64}")

MAX_BYTES = 64 << 20
"""Of the largest receipt: it names a million blocks."""
MAX_ARGUMENTS = 2 << 20
"""Bytes of all arguments and variables, each with ARGUMENT_BYTES more: what Linux passes to a program
(execve(2))."""
ARGUMENT_BYTES = 9
"""A pointer and a zero byte."""
MAX_TEXT = 64 << 10
MAX_DIRS = 1000
_MAX_CID = 400
_MAX_SECONDS = 1e9
_MAX_ITEMS = MAX_ARGUMENTS + 500_000
"""Commas and brackets that a receipt may hold whatever its length; beside that, one for each CID. `[],` takes
3 bytes in JSON and 64 in memory."""
_CID_BYTES = 40

NOT_RECORDED = frozenset({"compile_timeout", "max_stdin"})
"""Limits that the guest can't notice."""

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
        "limits": {
            name: value
            for name, value in receipt.limits._asdict().items()
            if value is not None and name not in NOT_RECORDED
        },
        "dirs": [
            each._asdict() | {"cid": None if each.cid is None else cids.text(each.cid)}
            for each in receipt.dirs
        ],
        **{
            name: [cids.text(each) for each in getattr(receipt, name)]
            for name in ("read", "missing", "ahead")
        },
        **{name: getattr(receipt, name)._asdict() for name in ("stdin", "stdout", "stderr")},
    }
    del fields["name"]
    whole = {"kind": _KIND, "format": FORMAT, **fields, "differs": receipt.differs}
    return json.dumps(whole, indent=1, ensure_ascii=False).encode() + b"\n"


def decode(data: bytes) -> Receipt:
    """Raises ReceiptRefused for what is not a receipt, cut short, of a newer format, or out of bounds."""
    if (
        len(data) > MAX_BYTES
        or sum(map(data.count, (b",", b"[", b"{"))) > _MAX_ITEMS + len(data) // _CID_BYTES
    ):
        raise ReceiptRefused(f"the receipt is larger than any can be ({len(data)} bytes)")
    try:
        fields = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError) as exc:
        raise ReceiptRefused(f"the receipt is not JSON, or is cut short: {exc}") from exc
    if not isinstance(fields, dict) or fields.get("kind") != _KIND:
        raise ReceiptRefused("this JSON is not a receipt of ipfsfuse-run")
    if fields.get("format") != FORMAT or type(fields.get("format")) is not int:
        raise ReceiptRefused(
            f"the receipt has format {fields.get('format')!r:.40}; this version reads format {FORMAT}: "
            "use a newer ipfsfuse"
        )
    try:
        return _receipt(fields)
    except NotACid as exc:
        raise ReceiptRefused(f"the receipt names what is not a CID: {exc}") from exc
    except UsageError as exc:
        raise ReceiptRefused(f"the receipt's limits can't be used: {exc}") from exc
    except _Unfit as exc:
        raise ReceiptRefused(f"the receipt has no usable field {exc}") from exc


class _Unfit(Exception):
    """A field that is missing, or not what it must be; names it."""


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands there twice")
    return fields


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


_FIELDS = frozenset({"kind", "format", "differs", *Receipt._fields} - {"name"})


def _receipt(fields: Mapping[str, Any]) -> Receipt:
    for name in sorted(_FIELDS ^ fields.keys()):
        raise _Unfit(name[:MAX_TEXT] if name in _FIELDS else f"{name[:80]!r}: this format has no such field")
    guest = _record(fields["guest"], "guest", {"cid", "name"})
    _texts(fields["differs"], "differs")
    trapped, exit_code = _flag(fields["trapped"], "trapped"), _number(fields["exit_code"], "exit_code", 255)
    if trapped and exit_code != TRAPPED:
        raise _Unfit(f"exit_code: a guest that trapped has {TRAPPED}")
    argv, env = _texts(fields["argv"], "argv"), [_variable(each) for each in _list(fields["env"], "env")]
    if not argv:
        raise _Unfit("argv")
    if arguments_size(argv, env) > MAX_ARGUMENTS:
        raise _Unfit(f"argv, env: they have more than {MAX_ARGUMENTS} bytes")
    cwd = fields["cwd"]
    if cwd is not None and not _text(cwd, "cwd").startswith("/"):
        raise _Unfit("cwd: it is not absolute")
    return Receipt(
        guest=_cid(guest["cid"], "guest"),
        name=_text(guest["name"], "guest"),
        argv=argv,
        env=env,
        cwd=cwd,
        limits=limits.checked(_record(fields["limits"], "limits")),
        dirs=[_dir(each) for each in _list(fields["dirs"], "dirs", MAX_DIRS)],
        deterministic=_flag(fields["deterministic"], "deterministic"),
        versions={
            _text(name, "versions"): _text(value, "versions")
            for name, value in _record(fields["versions"], "versions").items()
        },
        read=[_cid(each, "read") for each in _list(fields["read"], "read")],
        missing=[_cid(each, "missing") for each in _list(fields["missing"], "missing")],
        ahead=[_cid(each, "ahead") for each in _list(fields["ahead"], "ahead")],
        stdin=_digest(fields["stdin"], "stdin"),
        stdout=_digest(fields["stdout"], "stdout"),
        stderr=_digest(fields["stderr"], "stderr"),
        exit_code=exit_code,
        trapped=trapped,
        started=_time(fields["started"]),
        seconds=_seconds(fields["seconds"]),
    )


def arguments_size(argv: Sequence[str], env: Sequence[tuple[str, str]]) -> int:
    """What MAX_ARGUMENTS bounds."""
    texts = [*argv, *(f"{name}={value}" for name, value in env)]
    return sum(len(each.encode()) + ARGUMENT_BYTES for each in texts)


def _record(given: object, name: str, keys: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(given, dict) or (keys is not None and given.keys() != keys):
        raise _Unfit(name)
    return given


def _list(given: object, name: str, most: int = MAX_BYTES) -> list[Any]:
    if not isinstance(given, list) or len(given) > most:
        raise _Unfit(name)
    return given


def _texts(given: object, name: str) -> list[str]:
    return [_text(each, name, MAX_ARGUMENTS) for each in _list(given, name)]


def _text(given: object, name: str, most: int = MAX_TEXT) -> str:
    """As a guest can be given it: JSON may name half of a surrogate pair, which no text has."""
    if not isinstance(given, str) or len(given) > most or "\0" in given:
        raise _Unfit(name)
    try:
        given.encode()
    except UnicodeEncodeError as exc:
        raise _Unfit(f"{name}: {given[:80]!r} is not UTF-8") from exc
    return given


def _variable(given: object) -> tuple[str, str]:
    pair = _texts(given, "env")
    if len(pair) != 2 or not pair[0] or "=" in pair[0]:
        raise _Unfit("env")
    return pair[0], pair[1]


def _cid(given: object, name: str) -> Cid:
    return cids.parse(_text(given, name, _MAX_CID))


def _flag(given: object, name: str) -> bool:
    if not isinstance(given, bool):
        raise _Unfit(name)
    return given


def _number(given: object, name: str, most: int = (1 << 63) - 1) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given <= most:
        raise _Unfit(name)
    return given


def _seconds(given: object) -> float:
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 <= given <= _MAX_SECONDS:
        raise _Unfit("seconds")
    return float(given)


def _time(given: object) -> str:
    text = _text(given, "started", 40)
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError as exc:
        raise _Unfit("started: it is not a time of ISO 8601") from exc
    return text


def _dir(given: object) -> GivenDir:
    fields = _record(given, "dirs", {"guest", "writable", "cid"})
    cid = None if fields["cid"] is None else _cid(fields["cid"], "dirs")
    return GivenDir(_text(fields["guest"], "dirs"), _flag(fields["writable"], "dirs"), cid)


def _digest(given: object, name: str) -> Digest:
    fields = _record(given, name, {"sha256", "size"})
    if not isinstance(fields["sha256"], str) or not _SHA256.fullmatch(fields["sha256"]):
        raise _Unfit(name)
    return Digest(fields["sha256"], _number(fields["size"], name))
