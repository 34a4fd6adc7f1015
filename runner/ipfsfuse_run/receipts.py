"""The receipt of a run (what went in, what was read, what came out) as values, as JSON, and in a CAR with the
blocks.

A receipt is one JSON object; docs/RUNNING.md names its fields. Format 2 is written; format 1 is still read. A
receipt may come from anyone, so the decoder is strict: each field has its type and its bounds, no key appears
twice, numbers are finite, and limits pass the same check as the command line's. A newer format is refused.

The root of the CAR is a UnixFS directory, so that `ipfsfuse mount --from run.car` shows the run:
receipt.json, guest.wasm, stdin, stdout, stderr, out, dir/N for each folder that was given, signature.json,
and ipfs/CID for each root that was used. Below the root every block is there, so that a node can pin it. What
was read is there in part alone: so ipfs/CID is a symlink to it in the mount. (Format 1 links it.) The CAR is
written whole or not at all, and every block is checked against its CID when it is read.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from ipfsfuse.dag import builder, car, file_layout
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import Built, Stored
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Leaf, Node, Shard, Symlink, parse
from ipfsfuse.errors import Malformed, NotACid, StoreFailed, Unsupported, UsageError, WrongBlock
from ipfsfuse_run import limits, read_paths
from ipfsfuse_run.errors import TRAPPED, ReceiptRefused
from ipfsfuse_run.growth import NAME_BYTES
from ipfsfuse_run.limits import Limits
from ipfsfuse_run.read_paths import Row
from ipfsfuse_run.supervisor import Digest

FORMAT = 2
_KIND = "ipfsfuse-run receipt"
RECEIPT, GUEST, STDIN, STDOUT, STDERR = "receipt.json", "guest.wasm", "stdin", "stdout", "stderr"
OUT, DIRS, IPFS, SIGNATURE = "out", "dir", "ipfs", "signature.json"
"""What is in the root of the CAR."""

_SHA256, _SALT = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")

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

NOT_RECORDED = frozenset({"compile_timeout", "compile_memory", "max_stdin"})
"""Limits that the guest can't notice."""

ALWAYS_DIFFERS = ("device numbers", "the attributes of /")
BY_CHANCE = ("clocks", "random numbers", "NaN bits")


class Variable(NamedTuple):
    """A variable of the guest's. `sha256` is of the salt, the name, `=` and the value; format 1 has none.
    `value` is None where it is not recorded."""

    name: str
    sha256: str
    value: str | None


def variable(salt: str, name: str, value: str, keep: bool) -> Variable:
    return Variable(name, variable_hash(salt, name, value), value if keep else None)


def variable_hash(salt: str, name: str, value: str) -> str:
    """`salt` is hexadecimal: it keeps two receipts from showing that a value is the same in both."""
    return hashlib.sha256(bytes.fromhex(salt) + f"{name}={value}".encode()).hexdigest()


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
    env: Sequence[Variable]
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
    # what format 1 does not have
    format: int = 1
    salt: str = ""
    root: str | None = None
    tmp: int = 0
    engine: str = "library"
    paths: Sequence[Row] = ()
    """What was read, by path."""
    contents: Mapping[str, Cid] = MappingProxyType({})
    """The files STDIN, STDOUT and STDERR."""
    out: Cid | None = None
    """The folder of results; None if there was none."""
    limit: str | None = None
    """What ended the run, where the runner ended it: a field of Limits, or `tmp`."""

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
        "format": FORMAT,
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
    number = fields.get("format")
    if type(number) is not int or number not in _READERS:
        raise ReceiptRefused(
            f"the receipt has format {number!r:.40}; this version reads formats 1 to {FORMAT}: "
            "use a newer ipfsfuse"
        )
    try:
        return _READERS[number](fields)
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


_FIELDS_1 = frozenset(
    {
        "kind",
        "format",
        "guest",
        "argv",
        "env",
        "cwd",
        "limits",
        "dirs",
        "deterministic",
        "differs",
        "versions",
    }
    | {"read", "missing", "ahead", "stdin", "stdout", "stderr", "exit_code", "trapped", "started", "seconds"}
)
_FIELDS_2 = _FIELDS_1 - {"stdout", "stderr", "exit_code", "trapped"} | {
    *("root", "tmp", "engine", "paths", "results")
}


def _check_fields(fields: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in sorted(known ^ fields.keys()):
        raise _Unfit(name[:MAX_TEXT] if name in known else f"{name[:80]!r}: this format has no such field")


def _receipt_1(fields: Mapping[str, Any]) -> Receipt:
    _check_fields(fields, _FIELDS_1)
    trapped, exit_code = _end(fields)
    return Receipt(
        **_common(fields),
        env=[Variable(name, "", value) for name, value in map(_pair, _list(fields["env"], "env"))],
        dirs=[_dir(each) for each in _list(fields["dirs"], "dirs", MAX_DIRS)],
        stdin=_digest(fields["stdin"], "stdin"),
        stdout=_digest(fields["stdout"], "stdout"),
        stderr=_digest(fields["stderr"], "stderr"),
        exit_code=exit_code,
        trapped=trapped,
    )


def _receipt_2(fields: Mapping[str, Any]) -> Receipt:
    _check_fields(fields, _FIELDS_2)
    env = _record(fields["env"], "env", {"salt", "variables"})
    results = _record(
        fields["results"], "results", {"out", "stdout", "stderr", "exit_code", "trapped", "limit"}
    )
    trapped, exit_code = _end(results)
    limit = results["limit"]
    if limit is not None and _text(limit, "limit") not in (*Limits._fields, "tmp"):
        raise _Unfit("limit")
    contents, digests = {}, {}
    for name, given in ((STDIN, fields["stdin"]), (STDOUT, results["stdout"]), (STDERR, results["stderr"])):
        contents[name], digests[name] = _stream(given, name)
    root = fields["root"]
    return Receipt(
        **_common(fields),
        env=_variables(env),
        dirs=[
            GivenDir(_text(each["guest"], "dirs"), False, _cid(each["cid"], "dirs"))
            for each in (
                _record(given, "dirs", {"guest", "cid"}) for given in _list(fields["dirs"], "dirs", MAX_DIRS)
            )
        ],
        stdin=digests[STDIN],
        stdout=digests[STDOUT],
        stderr=digests[STDERR],
        exit_code=exit_code,
        trapped=trapped,
        format=2,
        salt=env["salt"],
        root=None if root is None else _root(root),
        tmp=_number(fields["tmp"], "tmp"),
        engine=_text(fields["engine"], "engine"),
        paths=[_row(each) for each in _list(fields["paths"], "paths")],
        contents=contents,
        out=None if results["out"] is None else _cid(results["out"], "out"),
        limit=limit,
    )


_READERS = {1: _receipt_1, 2: _receipt_2}


def _common(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that both formats have in the same form."""
    guest = _record(fields["guest"], "guest", {"cid", "name"})
    _texts(fields["differs"], "differs")
    argv = _texts(fields["argv"], "argv")
    if not argv:
        raise _Unfit("argv")
    if arguments_size(argv, _given_variables(fields)) > MAX_ARGUMENTS:
        raise _Unfit(f"argv, env: they have more than {MAX_ARGUMENTS} bytes")
    cwd = fields["cwd"]
    if cwd is not None and not _text(cwd, "cwd").startswith("/"):
        raise _Unfit("cwd: it is not absolute")
    return {
        "guest": _cid(guest["cid"], "guest"),
        "name": _text(guest["name"], "guest"),
        "argv": argv,
        "cwd": cwd,
        "limits": limits.checked(_record(fields["limits"], "limits")),
        "deterministic": _flag(fields["deterministic"], "deterministic"),
        "versions": {
            _text(name, "versions"): _text(value, "versions")
            for name, value in _record(fields["versions"], "versions").items()
        },
        "read": [_cid(each, "read") for each in _list(fields["read"], "read")],
        "missing": [_cid(each, "missing") for each in _list(fields["missing"], "missing")],
        "ahead": [_cid(each, "ahead") for each in _list(fields["ahead"], "ahead")],
        "started": _time(fields["started"]),
        "seconds": _seconds(fields["seconds"]),
    }


def _given_variables(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    if fields["format"] == 1:
        return [_pair(each) for each in _list(fields["env"], "env")]
    env = _record(fields["env"], "env", {"salt", "variables"})
    return [(each.name, each.value or "") for each in _variables(env)]


def _end(fields: Mapping[str, Any]) -> tuple[bool, int]:
    trapped, exit_code = _flag(fields["trapped"], "trapped"), _number(fields["exit_code"], "exit_code", 255)
    if trapped and exit_code != TRAPPED:
        raise _Unfit(f"exit_code: a guest that trapped has {TRAPPED}")
    return trapped, exit_code


def _variables(env: Mapping[str, Any]) -> list[Variable]:
    salt = env["salt"]
    if not isinstance(salt, str) or not _SALT.fullmatch(salt):
        raise _Unfit("env: its salt is not 32 hexadecimal digits")
    found: dict[str, Variable] = {}
    for each in _list(env["variables"], "env"):
        keys = {"name", "sha256", "value"}
        fields = _record(
            each, "env", keys if isinstance(each, dict) and "value" in each else keys - {"value"}
        )
        name, value = _text(fields["name"], "env", MAX_ARGUMENTS), fields.get("value")
        if not name or "=" in name or name in found:
            raise _Unfit("env")
        hashed = _sha256(fields["sha256"], "env")
        if "value" in fields and variable_hash(salt, name, _text(value, "env", MAX_ARGUMENTS)) != hashed:
            raise _Unfit(f"env: the value of {name[:80]!r} is not the one whose hash is given")
        found[name] = Variable(name, hashed, value)
    return list(found.values())


def _root(given: object) -> str:
    text = _text(given, "root")
    if not text.strip("/") or text.startswith("/"):
        raise _Unfit("root")
    return text


def _row(given: object) -> Row:
    fields = _record(given, "paths", {"path", "type", "size", "read", "cid"})
    return Row(
        _text(fields["path"], "paths", MAX_BYTES),
        _text(fields["type"], "paths", 40),
        _number(fields["size"], "paths", (1 << 64) - 1),
        _number(fields["read"], "paths", (1 << 64) - 1),
        cids.text(_cid(fields["cid"], "paths")),
    )


def _stream(given: object, name: str) -> tuple[Cid, Digest]:
    fields = _record(given, name, {"cid", "sha256", "size"})
    digest = Digest(_sha256(fields["sha256"], name), _number(fields["size"], name))
    return _cid(fields["cid"], name), digest


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
    """A text that a guest can be given. JSON may name half of a surrogate pair, which no text has."""
    if not isinstance(given, str) or len(given) > most or "\0" in given:
        raise _Unfit(name)
    try:
        given.encode()
    except UnicodeEncodeError as exc:
        raise _Unfit(f"{name}: {given[:80]!r} is not UTF-8") from exc
    return given


def _pair(given: object) -> tuple[str, str]:
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
    return Digest(_sha256(fields["sha256"], name), _number(fields["size"], name))


def _sha256(given: object, name: str) -> str:
    if not isinstance(given, str) or not _SHA256.fullmatch(given):
        raise _Unfit(name)
    return given


# -- the CAR -----------------------------------------------------------------------------------------------

_PROFILE = builder.UNIXFS_V1_2025
MAX_BLOCK = 2 << 20
_MAX_HEADER = 64 << 10
_LEAF_BYTES = 64 << 10
_MAX_PATH = 4096
_SPARE_NODES = 64
"""`Writer` makes leaves of 1 MiB. A file that has more nodes and leaves than one for each _LEAF_BYTES and
_SPARE_NODES more was made to take long, and is refused."""


# -- writing -----------------------------------------------------------------------------------------------


class Writer:
    """Puts blocks into a CAR, each once. `add_*` give what a folder can link."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._seen: set[Cid] = set()
        out.write(car.encode_header([_NO_ROOT]))

    def put(self, cid: Cid, block: bytes) -> None:
        if cid not in self._seen:
            self._seen.add(cid)
            self._out.write(car.section_head(cid, len(block)) + block)

    def add_file(self, file: BinaryIO, stored: Stored = builder.NOTHING) -> Built:
        profile = _PROFILE if stored == builder.NOTHING else _PROFILE.with_metadata()
        file_builder, first = builder.FileBuilder(profile, self.put), file.read(profile.chunk_size)
        second = file.read(profile.chunk_size)
        if not second:
            only = builder.leaf(profile, first, stored)
            self.put(only.built.cid, only.block)
            return only.built
        for chunk in (first, second, *iter(lambda: file.read(profile.chunk_size), b"")):
            leaf = builder.leaf(profile, chunk)
            self.put(leaf.built.cid, leaf.block)
            file_builder.add(leaf.built)
        return file_builder.finish(stored)

    def add_folder(self, children: Sequence[tuple[str, Built]], stored: Stored = builder.NOTHING) -> Built:
        return builder.directory(
            _PROFILE, [(os.fsencode(name), built) for name, built in children], stored, self.put
        )

    def add_symlink(self, target: str) -> Built:
        return builder.symlink(_PROFILE, os.fsencode(target), builder.NOTHING, self.put)

    def add_tree(self, folder: Path) -> Built:
        """A folder of the host with its modes and times: what the guest could see of it. Raises StoreFailed,
        UsageError."""
        children: list[tuple[str, Built]] = []
        try:
            for entry in sorted(os.scandir(folder), key=lambda each: each.name):
                path, found = Path(entry.path), entry.stat(follow_symlinks=False)
                stored = Stored(found.st_mode & 0o7777, found.st_mtime_ns)
                if entry.is_symlink():
                    children.append(
                        (
                            entry.name,
                            builder.symlink(_PROFILE, os.fsencode(os.readlink(path)), stored, self.put),
                        )
                    )
                elif entry.is_dir():
                    children.append((entry.name, self.add_tree(path)))
                elif entry.is_file():
                    with path.open("rb") as file:
                        children.append((entry.name, self.add_file(file, stored)))
                else:
                    raise UsageError(f"{path} is neither file, folder nor symlink: it can't be recorded")
            found = folder.stat()
        except OSError as exc:
            raise StoreFailed(f"{exc.filename or folder} can't be recorded: {exc.strerror}") from exc
        except RecursionError as exc:
            raise StoreFailed("a given folder is nested too deeply to be recorded") from exc
        return self.add_folder(children, Stored(found.st_mode & 0o7777, found.st_mtime_ns))

    def add_results(self, folder: str, bound: int) -> "Results":
        """The folder of a guest's results, with the CID that `ipfsfuse add --hidden` gives it. The guest is
        gone, and what it left may be anything: no symlink is followed, no device or pipe opened, and more
        than `bound` bytes (each name counts NAME_BYTES) are refused. Another guest may have the same folder
        and put symlinks into it meanwhile: what lies elsewhere is refused. Raises StoreFailed."""
        left = bound
        files: list[tuple[str, str]] = []
        top = os.path.realpath(folder)
        stack = [_Level("", _names(top), [])]
        while True:
            level = stack[-1]
            if not level.names:
                stack.pop()
                built = self.add_folder(level.children)
                if not stack:
                    return Results(built, sorted(files))
                stack[-1].children.append((os.path.basename(level.path), built))
                continue
            name = level.names.pop()
            inside = os.path.join(level.path, name)
            try:
                path = os.path.join(top, inside)
                with _place(path) as (fd, opened):
                    found = os.fstat(fd)
                    left -= NAME_BYTES + (found.st_size if stat.S_ISREG(found.st_mode) else 0)
                    if left < 0:
                        raise StoreFailed(f"the results in {folder} are more than max-out={bound} bytes")
                    inside.encode()
                    if stat.S_ISDIR(found.st_mode):
                        stack.append(_Level(inside, _names(opened), []))
                    elif stat.S_ISLNK(found.st_mode):
                        level.children.append((name, self.add_symlink(os.readlink("", dir_fd=fd))))
                    elif stat.S_ISREG(found.st_mode):
                        with _Hashed(opened, found.st_size) as file:
                            level.children.append((name, self.add_file(file)))  # type: ignore[arg-type]
                        files.append((inside, file.digest()))
                    else:
                        raise StoreFailed(
                            f"{path!r} in the results is neither file, folder nor symlink: it can't be taken"
                        )
            except UnicodeEncodeError as exc:
                raise StoreFailed(f"{inside!r} in the results has a name that is not UTF-8") from exc
            except OSError as exc:
                raise StoreFailed(f"{inside!r} in the results can't be read: {exc.strerror}") from exc

    def close(self, root: Built) -> None:
        self._out.seek(0)
        self._out.write(car.encode_header([root.cid]))


class Results(NamedTuple):
    """A guest's results. `files` are their paths and SHA-256."""

    built: Built
    files: Sequence[tuple[str, str]]


class _Level(NamedTuple):
    """A folder of the results that is being read."""

    path: str
    names: list[str]
    children: list[tuple[str, Built]]


@contextlib.contextmanager
def _place(path: str) -> Iterator[tuple[int, str]]:
    """What lies at `path` itself, with no symlink on the way: a descriptor that only names it, and a path by
    which it can be opened. Raises OSError, StoreFailed."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        opened = f"/proc/self/fd/{fd}"
        if os.readlink(opened) != path:
            raise StoreFailed(f"{path!r} in the results was moved or replaced while it was taken")
        yield fd, opened
    finally:
        os.close(fd)


def _names(folder: str) -> list[str]:
    return sorted(os.listdir(folder), reverse=True)


class _Hashed:
    """A regular file that is hashed as it is read, and of which no more than `size` bytes are."""

    def __init__(self, path: str, size: int) -> None:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._file, self._left, self._hash = open(file, "rb"), size, hashlib.sha256()  # noqa: SIM115

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        self._hash.update(data)
        return data

    def digest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> "_Hashed":
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()


_NO_ROOT = Cid(b"\x01\x70\x12\x20" + bytes(32))
"""It is as long as every root that is written here, and keeps the place for one in the header."""


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well: only its owner can read it, for a
    record holds what was in variables, in arguments and on standard input. Raises StoreFailed."""
    part = path.with_name(f".{path.name[:200]}.{os.urandom(8).hex()}.part")
    try:
        file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(file, "w+b") as out:
            yield out
        part.replace(path)
    except OSError as exc:
        raise StoreFailed(f"{path} can't be written: {exc.strerror}") from exc
    finally:
        part.unlink(missing_ok=True)


def cid_of(file: BinaryIO) -> Cid:
    """The CID that `file` has in a record; it is read from its start."""
    file.seek(0)
    with open(os.devnull, "wb") as nowhere:
        return Writer(nowhere).add_file(file).cid


# -- reading -----------------------------------------------------------------------------------------------


class Place(NamedTuple):
    offset: int
    size: int


class Bundle:
    """A CAR that was read once from end to end: every block in it is what its CID says. Keeps places, not
    blocks, and looks again whenever it gives one: the file may have been changed since."""

    def __init__(self, path: Path) -> None:
        """Raises ReceiptRefused."""
        self.path = path
        self.size = 0
        """Bytes of the CAR file."""
        self._places: dict[bytes, Place] = {}
        try:
            self._file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115 # closed by `close`
        except OSError as exc:
            raise ReceiptRefused(f"{path} can't be read: {exc.strerror}") from exc
        try:
            self._root = self._index()
        except OSError as exc:
            self._file.close()
            raise ReceiptRefused(f"{path} can't be read: {exc.strerror}") from exc
        except (Malformed, NotACid, WrongBlock, Unsupported) as exc:
            self._file.close()
            raise ReceiptRefused(f"{path} is not an intact record of a run: {exc}") from exc

    def close(self) -> None:
        self._file.close()

    def _index(self) -> Cid:
        self.size = os.fstat(self._file.fileno()).st_size
        at = car.header_length(self._file.read(9))
        if at > _MAX_HEADER:
            raise Malformed(f"its header has {at} bytes: a run's has fewer than 100")
        self._file.seek(0)
        roots = car.decode_header(self._file.read(at))
        if len(roots) != 1:
            raise Malformed(f"{len(roots)} roots where a run has one")
        while at < self.size:
            head = os.pread(self._file.fileno(), car.HEAD_BYTES, at)
            found = car.section(head, at=0, base=at)
            if found.end > self.size:
                raise Malformed("it is cut short")
            place = Place(found.block, found.end - found.block)
            if place.size > MAX_BLOCK:
                raise Malformed(f"a block of {place.size} bytes: {MAX_BLOCK} are the most")
            cids.verify(found.cid, self._at(place))
            if cids.inline(found.cid) is None:
                self._places[cids.multihash(found.cid)] = place
            at = found.end
        return roots[0]

    def _at(self, place: Place) -> bytes:
        return os.pread(self._file.fileno(), place.size, place.offset)

    def __contains__(self, cid: Cid) -> bool:
        return cids.inline(cid) is not None or cids.multihash(cid) in self._places

    def block(self, cid: Cid) -> bytes:
        """Raises ReceiptRefused where it is not there, or not there any more."""
        inline = cids.inline(cid)
        if inline is not None:
            return inline
        try:
            block = self._at(self._places[cids.multihash(cid)])
            cids.verify(cid, block)
        except KeyError as exc:
            raise ReceiptRefused(f"{self.path} lacks the block {cids.text(cid)}") from exc
        except (OSError, WrongBlock) as exc:
            raise ReceiptRefused(f"{self.path} was changed while it was read: {exc}") from exc
        return block

    def node(self, cid: Cid) -> Node:
        try:
            return parse(cid, self.block(cid))
        except (Malformed, Unsupported) as exc:
            raise ReceiptRefused(f"{self.path}: {exc}") from exc

    def find(self, *names: str) -> Cid | None:
        """The CID at a path below the root; None where there is none."""
        cid = self._root
        for name in names:
            node = self.node(cid)
            found = node.find(os.fsencode(name)) if isinstance(node, Directory) else None
            if found is None:
                return None
            cid = found.cid
        return cid

    def file(self, cid: Cid) -> File:
        """Raises ReceiptRefused."""
        node = self.node(cid)
        if not isinstance(node, File):
            raise ReceiptRefused(f"{self.path}: {cids.text(cid)} is not a file")
        return node

    def content(self, cid: Cid, most: int) -> Iterator[bytes]:
        """The bytes of the file `cid`, by leaf. Raises ReceiptRefused, for a file of more than `most` bytes
        too: its size is what its blocks say, and a few of them can say anything."""
        file, offset = self.file(cid), 0
        if file.size > most:
            raise ReceiptRefused(f"{self.path}: a file in it has {file.size} bytes: {most} are the most")
        left = _SPARE_NODES + file.size // _LEAF_BYTES
        while offset < file.size:
            try:
                found, opened = self._leaves(file, offset, left)
                left -= opened + len(found)
                if left < 0 or not found:
                    raise Malformed(
                        f"{cids.brief(cid)}: it is cut into more pieces than a record's files are"
                    )
                for leaf in found:
                    yield bytes(file_layout.leaf_content(leaf, self.block(leaf.cid)))
                    offset = leaf.offset + leaf.size
            except (Malformed, Unsupported) as exc:
                raise ReceiptRefused(f"{self.path}: {exc}") from exc

    def _leaves(self, file: File, offset: int, most: int) -> tuple[list[Leaf], int]:
        """The next leaves from `offset` on, and how many nodes were opened for them: little more than
        `most`."""
        walk, opened = file_layout.leaves(file, offset, file.size - offset, sure=True), 0
        try:
            wanted = next(walk)
            while opened <= most:
                opened += len(wanted)
                wanted = walk.send([self.node(each) for each in wanted])
        except StopIteration as stop:
            found: list[Leaf] = stop.value
            return found, opened
        return [], opened

    def files(self, cid: Cid, most: int) -> Iterator[tuple[str, File | Symlink | None]]:
        """What is below the folder `cid`, parents first, by path: None for a folder. The folder may come with
        a hostile record: each name counts NAME_BYTES and each file its size, and more than `most` bytes are
        refused. Raises ReceiptRefused."""
        stack = [("", cid)]
        while stack:
            path, at = stack.pop()
            if len(os.fsencode(path)) >= _MAX_PATH:
                raise ReceiptRefused(f"{self.path}: its results are nested more deeply than a path can say")
            node = self.node(at)
            if isinstance(node, Directory | Shard):
                if path:
                    yield path, None
                below = []
                for name, child in self._children(node):
                    most -= NAME_BYTES
                    if most < 0:
                        raise ReceiptRefused(f"{self.path}: its results are larger than max-out")
                    below.append((os.path.join(path, name), child))
                stack.extend(reversed(below))
                continue
            if not path:
                raise ReceiptRefused(f"{self.path}: its {OUT} is not a folder")
            most -= node.size if isinstance(node, File) else len(node.target)
            if most < 0:
                raise ReceiptRefused(f"{self.path}: its results are larger than max-out")
            yield path, node

    def _children(self, node: Directory | Shard) -> Iterator[tuple[str, Cid]]:
        """Of a sharded folder too. Raises ReceiptRefused for names that no folder can hold."""
        seen: set[bytes] = set()
        try:
            for cid, name in read_paths.entries(node, self.node):
                if name in seen or b"/" in name or b"\0" in name or name in (b"", b".", b".."):
                    raise Malformed(f"a folder holds the name {name!r:.80}")
                seen.add(name)
                yield name.decode(), cid
        except (Malformed, UnicodeDecodeError) as exc:
            raise ReceiptRefused(f"{self.path}: {exc}") from exc

    def extract(self, cid: Cid, folder: str, most: int) -> None:
        """Writes what is below the folder `cid` into the empty folder `folder`. Nothing is followed or
        replaced. Raises ReceiptRefused, StoreFailed."""
        try:
            for path, node in self.files(cid, most):
                at = os.path.join(folder, path)
                if node is None:
                    os.mkdir(at)
                elif isinstance(node, Symlink):
                    os.symlink(node.target, at)
                else:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                    with open(os.open(at, flags, 0o666), "wb") as out:
                        out.writelines(self.content(node.cid, most))
        except OSError as exc:
            if exc.errno == errno.ENAMETOOLONG:
                raise ReceiptRefused(f"{self.path}: its results hold a name that is too long here") from exc
            raise StoreFailed(f"{exc.filename or folder!s:.300} can't be written: {exc.strerror}") from exc

    def receipt(self, cid: Cid) -> bytes:
        """The bytes of a receipt: never more than the CAR file has. Raises ReceiptRefused."""
        return b"".join(self.content(cid, min(MAX_BYTES, self.size)))
