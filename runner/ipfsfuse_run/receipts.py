"""The receipt of a run (its input, the blocks that it read, its output) as values and as JSON.

A receipt is one JSON object; docs/RUNNING.md names its fields. Format 2 is written; format 1 is still read. A
receipt may come from anyone, so the decoder is strict: each field has a type and bounds, no key appears
twice, numbers are finite, and limits pass the same check as those of the command line. A newer format is
refused.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid, UsageError
from ipfsfuse_run import limits
from ipfsfuse_run.errors import TRAPPED, ReceiptRefused
from ipfsfuse_run.limits import Limits
from ipfsfuse_run.read_paths import Row

RECEIPT_FORMAT = 2
_KIND = "ipfsfuse-run receipt"
RECEIPT, GUEST, STDIN, STDOUT, STDERR = "receipt.json", "guest.wasm", "stdin", "stdout", "stderr"
OUT, DIRS, IPFS, SIGNATURE = "out", "dir", "ipfs", "signature.json"
"""Names in the root of the CAR file (`record`)."""

_HEXADECIMAL = re.compile("[0-9a-f]*")

MAX_RECEIPT = 64 << 20
"""Bytes of the largest receipt, which is enough for a million blocks."""
MAX_ARGUMENTS = 2 << 20
"""Bytes of all arguments and variables, each with ARGUMENT_BYTES more: the most that Linux passes to a
program (execve(2))."""
ARGUMENT_BYTES = 9
"""A pointer and a zero byte."""
MAX_TEXT = 64 << 10
MAX_DIRS = 1000
_MAX_CID = 400
_MAX_SECONDS = 1e9
_MAX_ITEMS = MAX_ARGUMENTS + 500_000
"""Commas and brackets that any receipt may hold, besides one for each _CID_BYTES of its length. `[],` takes
3 bytes in JSON and 64 in memory."""
_CID_BYTES = 40

NOT_RECORDED = frozenset({"compile_timeout", "compile_memory", "max_stdin"})
"""Limits that a guest can't notice."""

ALWAYS_DIFFERS = ("device numbers", "the attributes of /")
BY_CHANCE = ("clocks", "random numbers", "NaN bits")


class Variable(NamedTuple):
    """A variable of the guest's. `sha256` is the hash of the salt, the name, `=` and the value; format 1 has
    none. `value` is None if it is not recorded."""

    name: str
    sha256: str
    value: str | None


def variable_hash(salt: str, name: str, value: str) -> str:
    """`salt` is hexadecimal. Because of it, two receipts don't show that a value is the same in both."""
    return hashlib.sha256(bytes.fromhex(salt) + f"{name}={value}".encode()).hexdigest()


class GivenDir(NamedTuple):
    """A folder of --dir; `cid` is None if the folder is not part of the record."""

    guest: str
    cid: Cid | None


class Digest(NamedTuple):
    """Hash and size of what passed through a stream."""

    sha256: str
    size: int

    def __str__(self) -> str:
        return f"{self.sha256} ({self.size} bytes)"


class Receipt(NamedTuple):
    guest: Cid
    name: str
    """GUEST as it was given, with U+FFFD for bytes that are not UTF-8."""
    argv: Sequence[str]
    env: Sequence[Variable]
    cwd: str | None
    limits: Limits
    dirs: Sequence[GivenDir]
    deterministic: bool
    versions: Mapping[str, str]
    read: Sequence[Cid]
    """Every block of /ipfs that the guest's reads needed, in the order of first use."""
    missing: Sequence[Cid]
    """Blocks that the guest's reads needed and no source gave: the guest saw an error."""
    ahead: Sequence[Cid]
    """Blocks that read-ahead fetched and the guest's reads did not need."""
    stdin: Digest
    stdout: Digest
    stderr: Digest
    exit_code: int
    trapped: bool
    started: str
    """UTC, ISO 8601."""
    seconds: float
    # not in format 1
    format: int = 1
    salt: str = ""
    root: str | None = None
    tmp: int = 0
    engine: str = "library"
    paths: Sequence[Row] = ()
    """What was read, by path."""
    contents: Mapping[str, Cid] = MappingProxyType({})
    """The CIDs of the files STDIN, STDOUT and STDERR."""
    out: Cid | None = None
    """The folder of results; None if there was none."""
    limit: str | None = None
    """The limit for which the runner ended the run: a field of Limits, or `tmp`."""

    @property
    def differs(self) -> tuple[str, ...]:
        """What may differ from run to run."""
        return ALWAYS_DIFFERS if self.deterministic else (*BY_CHANCE, *ALWAYS_DIFFERS)


def encode(receipt: Receipt) -> bytes:
    """The receipt in format 2."""

    def stream(name: str, digest: Digest) -> dict[str, object]:
        return {"cid": cids.text(receipt.contents[name]), **digest._asdict()}

    whole = {
        "kind": _KIND,
        "format": RECEIPT_FORMAT,
        "guest": {"cid": cids.text(receipt.guest), "name": receipt.name},
        "argv": receipt.argv,
        "env": {
            "salt": receipt.salt,
            "variables": [
                {name: value for name, value in each._asdict().items() if value is not None}
                for each in receipt.env
            ],
        },
        "cwd": receipt.cwd,
        "root": receipt.root,
        "tmp": receipt.tmp,
        "limits": {
            name: value
            for name, value in receipt.limits._asdict().items()
            if value is not None and name not in NOT_RECORDED
        },
        "dirs": [{"guest": each.guest, "cid": cids.text(each.cid)} for each in receipt.dirs if each.cid],
        "stdin": stream(STDIN, receipt.stdin),
        "deterministic": receipt.deterministic,
        "engine": receipt.engine,
        "versions": receipt.versions,
        "differs": receipt.differs,
        **{
            name: [cids.text(each) for each in getattr(receipt, name)]
            for name in ("read", "missing", "ahead")
        },
        "paths": [each._asdict() for each in receipt.paths],
        "results": {
            "out": None if receipt.out is None else cids.text(receipt.out),
            "stdout": stream(STDOUT, receipt.stdout),
            "stderr": stream(STDERR, receipt.stderr),
            "exit_code": receipt.exit_code,
            "trapped": receipt.trapped,
            "limit": receipt.limit,
        },
        "started": receipt.started,
        "seconds": receipt.seconds,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False).encode() + b"\n"


def decode(data: bytes) -> Receipt:
    """Raises ReceiptRefused if the data is not a receipt, cut short, of a newer format, or out of bounds."""
    if (
        len(data) > MAX_RECEIPT
        or sum(map(data.count, (b",", b"[", b"{"))) > _MAX_ITEMS + len(data) // _CID_BYTES
    ):
        raise ReceiptRefused(f"the receipt is larger than any can be ({len(data)} bytes)")
    try:
        fields = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError) as exc:
        raise ReceiptRefused(f"the receipt is not JSON, or is cut short: {exc}") from exc
    if not isinstance(fields, dict) or fields.get("kind") != _KIND:
        raise ReceiptRefused("this JSON is not a receipt of ipfsfuse-run")
    number = fields.get("format")
    if type(number) is not int or number not in _FIELDS:
        raise ReceiptRefused(
            f"the receipt has format {number!r:.40}; this version reads formats 1 to {RECEIPT_FORMAT}: "
            "use a newer ipfsfuse"
        )
    try:
        return _receipt(fields, number)
    except NotACid as exc:
        raise ReceiptRefused(f"the receipt names what is not a CID: {exc}") from exc
    except UsageError as exc:
        raise ReceiptRefused(f"the receipt's limits can't be used: {exc}") from exc
    except _BadField as exc:
        raise ReceiptRefused(f"the receipt has no usable field {exc}") from exc


class _BadField(Exception):
    """A field is missing or wrong; the message names it."""


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands there twice")
    return fields


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


_COMMON = frozenset(
    {"kind", "format", "guest", "argv", "env", "cwd", "limits", "dirs", "deterministic", "differs"}
    | {"versions", "read", "missing", "ahead", "stdin", "started", "seconds"}
)
_ENDS = frozenset({"stdout", "stderr", "exit_code", "trapped"})
_FIELDS = {1: _COMMON | _ENDS, 2: _COMMON | {"root", "tmp", "engine", "paths", "results"}}
"""The fields of a receipt, by format. A receipt has all of them and no others."""


def _receipt(fields: Mapping[str, Any], number: int) -> Receipt:
    """Raises _BadField, NotACid, UsageError."""
    for name in sorted(_FIELDS[number] ^ fields.keys()):
        is_known = name in _FIELDS[number]
        raise _BadField(name if is_known else f"{name[:80]!r}: this format has no such field")
    results = fields if number == 1 else _record(fields["results"], "results", _ENDS | {"out", "limit"})
    streams = {STDIN: fields["stdin"], STDOUT: results["stdout"], STDERR: results["stderr"]}
    keys = {"sha256", "size"} if number == 1 else {"cid", "sha256", "size"}
    digests = {name: _digest(_record(given, name, keys), name) for name, given in streams.items()}
    guest = _record(fields["guest"], "guest", {"cid", "name"})
    salt, env = _environment(fields["env"], number)
    argv = _texts(fields["argv"], "argv")
    if not argv:
        raise _BadField("argv")
    if arguments_size(argv, [(each.name, each.value or "") for each in env]) > MAX_ARGUMENTS:
        raise _BadField(f"argv, env: they have more than {MAX_ARGUMENTS} bytes")
    cwd = fields["cwd"]
    if cwd is not None and not _text(cwd, "cwd").startswith("/"):
        raise _BadField("cwd: it is not absolute")
    trapped = _flag(results["trapped"], "trapped")
    exit_code = _number(results["exit_code"], "exit_code", 255)
    if trapped and exit_code != TRAPPED:
        raise _BadField(f"exit_code: a guest that trapped has {TRAPPED}")
    _texts(fields["differs"], "differs")
    found = Receipt(
        guest=_cid(guest["cid"], "guest"),
        name=_text(guest["name"], "guest"),
        argv=argv,
        env=env,
        cwd=cwd,
        limits=limits.checked(_record(fields["limits"], "limits")),
        dirs=[_dir(each, number) for each in _list(fields["dirs"], "dirs", MAX_DIRS)],
        deterministic=_flag(fields["deterministic"], "deterministic"),
        versions={
            _text(name, "versions"): _text(value, "versions")
            for name, value in _record(fields["versions"], "versions").items()
        },
        read=_cids(fields["read"], "read"),
        missing=_cids(fields["missing"], "missing"),
        ahead=_cids(fields["ahead"], "ahead"),
        stdin=digests[STDIN],
        stdout=digests[STDOUT],
        stderr=digests[STDERR],
        exit_code=exit_code,
        trapped=trapped,
        started=_time(fields["started"]),
        seconds=_seconds(fields["seconds"]),
        format=number,
        salt=salt,
    )
    if number == 1:
        return found
    root, out, limit = fields["root"], results["out"], results["limit"]
    if limit is not None and _text(limit, "limit") not in (*Limits._fields, "tmp"):
        raise _BadField("limit")
    if root is not None and (not _text(root, "root").strip("/") or root.startswith("/")):
        raise _BadField("root")
    return found._replace(
        root=root,
        tmp=_number(fields["tmp"], "tmp"),
        engine=_text(fields["engine"], "engine"),
        paths=[_row(each) for each in _list(fields["paths"], "paths")],
        contents={name: _cid(given["cid"], name) for name, given in streams.items()},
        out=None if out is None else _cid(out, "out"),
        limit=limit,
    )


def _environment(given: object, number: int) -> tuple[str, list[Variable]]:
    """The salt and the variables. Format 1 has no salt, and pairs of name and value."""
    if number == 1:
        pairs = [_texts(each, "env") for each in _list(given, "env")]
        if any(len(pair) != 2 or not pair[0] or "=" in pair[0] for pair in pairs):
            raise _BadField("env")
        return "", [Variable(name, "", value) for name, value in pairs]
    env = _record(given, "env", {"salt", "variables"})
    salt = _hexadecimal(env["salt"], "env", 32)
    found: dict[str, Variable] = {}
    for each in _list(env["variables"], "env"):
        keys = {"name", "sha256", "value"}
        fields = _record(
            each, "env", keys if isinstance(each, dict) and "value" in each else keys - {"value"}
        )
        name, value = _text(fields["name"], "env", MAX_ARGUMENTS), fields.get("value")
        if not name or "=" in name or name in found:
            raise _BadField("env")
        hashed = _hexadecimal(fields["sha256"], "env", 64)
        if "value" in fields and variable_hash(salt, name, _text(value, "env", MAX_ARGUMENTS)) != hashed:
            raise _BadField(f"env: the value of {name[:80]!r} is not the one whose hash is given")
        found[name] = Variable(name, hashed, value)
    return salt, list(found.values())


def _row(given: object) -> Row:
    fields = _record(given, "paths", {"path", "type", "size", "read", "cid"})
    return Row(
        _text(fields["path"], "paths", MAX_RECEIPT),
        _text(fields["type"], "paths", 40),
        _number(fields["size"], "paths", (1 << 64) - 1),
        _number(fields["read"], "paths", (1 << 64) - 1),
        cids.text(_cid(fields["cid"], "paths")),
    )


def arguments_size(argv: Sequence[str], env: Sequence[tuple[str, str]]) -> int:
    """The size that MAX_ARGUMENTS bounds."""
    texts = [*argv, *(f"{name}={value}" for name, value in env)]
    return sum(len(each.encode()) + ARGUMENT_BYTES for each in texts)


def _record(given: object, name: str, keys: Collection[str] | None = None) -> dict[str, Any]:
    if not isinstance(given, dict) or (keys is not None and given.keys() != set(keys)):
        raise _BadField(name)
    return given


def _list(given: object, name: str, most: int = MAX_RECEIPT) -> list[Any]:
    if not isinstance(given, list) or len(given) > most:
        raise _BadField(name)
    return given


def _texts(given: object, name: str) -> list[str]:
    return [_text(each, name, MAX_ARGUMENTS) for each in _list(given, name)]


def _text(given: object, name: str, most: int = MAX_TEXT) -> str:
    """A text that can be passed to a guest. JSON may contain half of a surrogate pair, which has no UTF-8."""
    if not isinstance(given, str) or len(given) > most or "\0" in given:
        raise _BadField(name)
    try:
        given.encode()
    except UnicodeEncodeError as exc:
        raise _BadField(f"{name}: {given[:80]!r} is not UTF-8") from exc
    return given


def _cid(given: object, name: str) -> Cid:
    return cids.parse(_text(given, name, _MAX_CID))


def _cids(given: object, name: str) -> list[Cid]:
    return [_cid(each, name) for each in _list(given, name)]


def _flag(given: object, name: str) -> bool:
    if not isinstance(given, bool):
        raise _BadField(name)
    return given


def _number(given: object, name: str, most: int = (1 << 63) - 1) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given <= most:
        raise _BadField(name)
    return given


def _seconds(given: object) -> float:
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 <= given <= _MAX_SECONDS:
        raise _BadField("seconds")
    return float(given)


def _time(given: object) -> str:
    text = _text(given, "started", 40)
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError as exc:
        raise _BadField("started: it is not a time of ISO 8601") from exc
    return text


def _dir(given: object, number: int) -> GivenDir:
    fields = _record(given, "dirs", {"guest", "cid", "writable"} if number == 1 else {"guest", "cid"})
    if number == 1:
        _flag(fields["writable"], "dirs")
        if fields["cid"] is None:
            return GivenDir(_text(fields["guest"], "dirs"), None)
    return GivenDir(_text(fields["guest"], "dirs"), _cid(fields["cid"], "dirs"))


def _digest(fields: Mapping[str, Any], name: str) -> Digest:
    return Digest(_hexadecimal(fields["sha256"], name, 64), _number(fields["size"], name))


def _hexadecimal(given: object, name: str, digits: int) -> str:
    if not isinstance(given, str) or len(given) != digits or not _HEXADECIMAL.fullmatch(given):
        raise _BadField(f"{name}: {given!r:.80} is not {digits} hexadecimal digits")
    return given
