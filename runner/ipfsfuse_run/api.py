"""Runs guests for Python programs: the same as `ipfsfuse-run`, with results instead of exit codes.

`ipfsfuse_run.__all__` lists what is public. A run executes the same code as the command, in a process that
the fork server (`forkserver`) starts.
"""

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypedDict, Unpack

from ipfsfuse import errors, units
from ipfsfuse.errors import IpfsFuseError, UsageError
from ipfsfuse_run import errors as own_errors
from ipfsfuse_run import forkserver
from ipfsfuse_run import limits as limiting
from ipfsfuse_run import options as parsing
from ipfsfuse_run.errors import COULD_NOT_RUN, GuestRefused
from ipfsfuse_run.options import Options

MAX_STDOUT = 64 << 20
"""Bytes of standard output, and of standard error, that a run may have where `limits` has no max_stdout."""
_ENDING_S = 2.0
"""Seconds that a cancelled run gets to end."""

Path = str | os.PathLike[str]
Ended = Literal["exited", "trapped", "timeout", "limit", "killed"]


@dataclass(frozen=True)
class Result:
    """How a guest's run ended, and its output."""

    exit_code: int
    """The guest's own, or 124 out of time, 134 trapped or over a limit, 128 + a signal, as the command has
    it."""
    stdout: bytes
    stderr: bytes
    ended: Ended
    """`exited`: by itself, with any code. `killed`: by a signal from outside, or because memory ran out."""
    reason: str = ""
    """The sentence that the command would print; "" for a guest that exited."""
    limit: str | None = None
    """The limit that ended the run, by its name in `limits`."""
    trap: str | None = None
    """wasmtime's message and back-trace. None if the wasmtime command ran the guest: it writes them to
    stderr."""
    out: str | None = None
    """The CID of the results in the folder `out`; None for a run that max_out ended."""
    receipt: Mapping[str, Any] | None = None
    """The receipt, if `record` was given: the same as `ipfsfuse-run inspect --json` prints."""
    notes: Sequence[str] = ()
    """Other lines that the command would have printed."""

    def check(self) -> "Result":
        """Returns this result. Raises GuestFailed unless the guest exited with 0."""
        if self.ended != "exited" or self.exit_code:
            raise GuestFailed(self)
        return self


class GuestFailed(IpfsFuseError):
    """The guest did not exit with 0. `result` has its output."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.reason or f"the guest exited with {result.exit_code}")
        self.result = result


class ResultsNotKept(IpfsFuseError):
    """The guest ran, but its results or its receipt could not be written or added to the library.

    `result` says how the guest ended. It has the guest's streams, and the receipt if that was written. The
    files that the guest wrote are still in the folder `out`."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result


class Asked(TypedDict, total=False):
    """The keywords of `run`. The command has options of the same names."""

    env: Mapping[str, str]
    stdin: bytes | BinaryIO | None
    """Bytes, or an open file; nothing by default."""
    dirs: Sequence[str]
    """`HOST`, `HOST::GUEST` or `HOST::GUEST::ro`, as --dir takes them."""
    cwd: str | None
    root: str | None
    """CID[/path] of the directory that is the guest's `/`."""
    tmp: int | str
    """Bytes that its /tmp may hold, or a text such as "64MiB"; 0 for none."""
    out: Path | None
    """A new or empty folder for its results: /out."""
    add: bool
    """Also add the results to the library."""
    invoke: str | None
    """The exported function that is called in place of `_start`, with `args`."""
    preload: Mapping[str, Path]
    """Modules that the guest may import from, by name: files, or /ipfs/CID/path."""
    limits: Mapping[str, float | str]
    """The names of -W with `_`; bytes and seconds, or texts such as "64MiB". MAX_STDOUT holds by default."""
    mount: Path | None
    record: Path | None
    """A file for the receipt: RUN.json, or RUN.car with all that was read."""
    record_env: bool
    sign: Path | None
    """An Ed25519 key that signs the record: a PEM file."""
    allow: Sequence[str]
    ipns: Sequence[str]
    sources: Sequence[str]
    """What --from takes."""
    offline: bool
    isolated: bool
    cache_dir: Path | None
    engine: Literal["auto", "library", "command"]
    deterministic: bool
    require_sandbox: bool


def run(guest: Path, *args: str, **asked: Unpack[Asked]) -> Result:
    """Runs the guest (a file, or /ipfs/CID/path) until it exits, traps or is ended.

    Raises UsageError for arguments that can't be used, GuestRefused for a guest that can't be run, and
    MountFailed, DaemonFailed or StoreFailed if there is no mount for it. Raises ResultsNotKept if the guest
    ran, but its results or receipt could not be stored.
    """
    options = _options(guest, args, asked)
    with _start_run(options, asked.get("stdin")) as started:
        started.received()
        return started.result()


async def run_trio(guest: Path, *args: str, **asked: Unpack[Asked]) -> Result:
    """The same as `run`, for trio. A cancelled run has ended when this returns."""
    import trio

    options = _options(guest, args, asked)
    with _start_run(options, asked.get("stdin")) as started:
        started.socket.setblocking(False)
        try:
            while not started.received():
                await trio.lowlevel.wait_readable(started.socket)
        except trio.Cancelled:
            started.socket.shutdown(socket.SHUT_WR)
            with trio.move_on_after(_ENDING_S, shield=True):
                while not started.received():
                    await trio.lowlevel.wait_readable(started.socket)
            raise
        return started.result()


def _options(guest: Path, args: Sequence[str], asked: Asked) -> Options:
    """Raises UsageError, and TypeError for an unknown keyword."""
    unknown = asked.keys() - Asked.__annotations__.keys()
    if unknown:
        raise TypeError(f"run() has no keyword {min(unknown)!r}")
    texts = _texts("the guest and its arguments", (os.fspath(guest), *args))
    env = dict(asked.get("env") or {})
    _texts("env", [*env, *env.values()])
    for name in env:
        if not name or "=" in name:
            raise UsageError(f"env: {name!r} is not the name of a variable")
    if asked.get("engine", "auto") not in parsing.ENGINES:
        raise UsageError(f"engine {asked['engine']!r} is not one of {', '.join(parsing.ENGINES)}")
    limits = limiting.from_names(asked.get("limits") or {})
    if limits.max_stdout is None:
        limits = limits._replace(max_stdout=MAX_STDOUT)
    given: dict[str, Any] = {name: value for name, value in asked.items() if name in Options._fields}
    for name in _PATHS & given.keys():
        given[name] = None if given[name] is None else os.fspath(given[name])
    for name in _TUPLES & given.keys():
        given[name] = tuple(given[name])
    given |= {
        "env": tuple(env.items()),
        "dirs": tuple(map(parsing.parse_dir, asked.get("dirs", ()))),
        "tmp": None if "tmp" not in asked else units.size_or_zero(str(asked["tmp"])),
        "return_cid": "out" in asked,
        "preload": tuple((name, os.fspath(path)) for name, path in asked.get("preload", {}).items()),
        "root": None if asked.get("root") is None else parsing.parse_root(str(asked["root"])),
        "limits": limits,
        "mount_options": (
            *(f"--from={each}" for each in asked.get("sources", ())),
            *["--offline"] * asked.get("offline", False),
        ),
    }
    found = Options(texts[0], texts[1:], **given)
    parsing.check(found)
    return found


_PATHS = {"out", "mount", "cache_dir", "record", "sign"}
_TUPLES = {"allow", "ipns"}
"""Keywords whose values become text, and tuples."""


def _texts(what: str, given: Sequence[object]) -> tuple[str, ...]:
    """Raises UsageError for values that can't be arguments of a program."""
    for each in given:
        if not isinstance(each, str) or "\0" in each:
            raise UsageError(f"{what}: {each!r} is not a text without null bytes")
    return tuple(map(str, given))


@contextmanager
def _start_run(asked: Options, stdin: bytes | BinaryIO | None) -> Iterator["_Run"]:
    with ExitStack() as stack:
        written = [_spare(stack, name) for name in ("stdout", "stderr", "said")]
        with ExitStack() as begun:
            given = _open_stdin(begun, stdin)
            request = forkserver.Request(asked, os.getcwd(), dict(os.environ))
            started = forkserver.start(request, given, *written)
        with started:
            yield _Run(asked.guest, started, *written)


class _Run:
    """A run that was started: its socket, and the files without names that it writes to."""

    def __init__(self, guest: str, started: socket.socket, stdout: int, stderr: int, said: int) -> None:
        self.socket = started
        self._guest, self._stdout, self._stderr, self._said = guest, stdout, stderr, said
        self._answer = b""

    def received(self) -> bool:
        """Whether the answer is complete. Waits until it is if the socket blocks."""
        while True:
            try:
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True
            if not data:
                return True
            self._answer += data

    def result(self) -> Result:
        if not self._answer:
            raise IpfsFuseError(f"the process that ran {self._guest} was killed, and its guest with it")
        said = _content(self._said).decode(errors="replace").splitlines()
        notes = tuple(each.removeprefix("ipfsfuse-run: ") for each in said)
        answer = json.loads(self._answer)
        if "error" in answer:
            raise _error(answer["error"])(answer["text"])
        outcome = answer["outcome"]
        if outcome["refused"] is not None:
            raise (UsageError if outcome["code"] != COULD_NOT_RUN else GuestRefused)(outcome["refused"])
        reason = outcome["why"] or ""
        result = Result(
            exit_code=outcome["code"],
            stdout=_content(self._stdout),
            stderr=_content(self._stderr),
            ended=_ended(outcome),
            reason=reason,
            limit=outcome["limit"],
            trap=outcome["trap"],
            out=answer["out"],
            receipt=None if answer["receipt"] is None else json.loads(answer["receipt"]),
            notes=tuple(each for each in notes if each != reason),
        )
        if "not_kept" in answer:
            raise ResultsNotKept(answer["not_kept"], result)
        return result


def _ended(outcome: Mapping[str, Any]) -> Ended:
    if outcome["limit"] is not None:
        return "timeout" if outcome["limit"] == "timeout" else "limit"
    if outcome["trapped"]:
        return "trapped"
    return "killed" if outcome["killed"] else "exited"


def _error(name: str) -> type[IpfsFuseError]:
    found = getattr(errors, name, None) or getattr(own_errors, name, IpfsFuseError)
    return found if isinstance(found, type) and issubclass(found, IpfsFuseError) else IpfsFuseError


def _spare(stack: ExitStack, name: str) -> int:
    file = os.memfd_create(name, os.MFD_CLOEXEC)
    stack.callback(os.close, file)
    return file


def _open_stdin(stack: ExitStack, stdin: bytes | BinaryIO | None) -> int:
    if stdin is None:
        file = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, file)
        return file
    if not isinstance(stdin, bytes | bytearray | memoryview):
        return stdin.fileno()
    file = _spare(stack, "stdin")
    with open(file, "wb", closefd=False) as out:
        out.write(stdin)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _content(file: int) -> bytes:
    size = os.fstat(file).st_size
    with open(f"/proc/self/fd/{file}", "rb") as opened:
        return opened.read(size)
