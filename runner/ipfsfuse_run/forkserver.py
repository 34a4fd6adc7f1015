"""The process that runs guests for a Python program: it has all imported that a run needs, and forks one
supervisor a run, which does what the command does.

The program itself may have threads and secrets: it is not forked. The two talk over a socket pair, so nobody
else can ask. Everything ends with the program: the server when its socket is closed, a run when its own
socket is. The server has one thread and makes no other.
"""

import gc
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from ipfsfuse.errors import IpfsFuseError
from ipfsfuse_run import processes
from ipfsfuse_run.errors import NotKept
from ipfsfuse_run.options import Options

if TYPE_CHECKING:
    from ipfsfuse_run.supervisor import CompletedRun

_FILES = 5
"""Descriptors that come with a run: its socket, stdin, stdout, stderr, and a file for the runner's words."""


class Request(NamedTuple):
    """One run, as the program asks for it."""

    options: Options
    cwd: str
    environment: Mapping[str, str]


# -- the program's side ------------------------------------------------------------------------------------


class _Server:
    """The server of this process. A process that was forked starts one of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def send(self, files: list[int]) -> None:
        """Hands a run's descriptors over; starts the server where there is none. Raises OSError."""
        with self._lock:
            if self._owner == os.getpid() and self._control is not None:
                try:
                    socket.send_fds(self._control, [b"run"], files)
                    return
                except OSError:
                    self._control.close()  # it was killed: begin again
            self._start()
            assert self._control is not None
            socket.send_fds(self._control, [b"run"], files)

    def _start(self) -> None:
        from ipfsfuse_run.mounts import child_environment

        if self._process is not None and self._owner == os.getpid():
            self._process.wait()  # its socket is closed: it is gone
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                # -P: a folder named ipfsfuse_run in the working directory must not be imported
                [sys.executable, "-P", "-c", f"{_MAIN}({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=child_environment(),
                cwd="/",
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # the terminal's Ctrl-C reaches the program alone, which ends the run
            )
        self._control, self._owner = ours, os.getpid()


_server = _Server()


def start(request: Request, stdin: int, stdout: int, stderr: int, said: int) -> socket.socket:
    """Begins a run. What the socket gives until its end is the answer, for `answer`; closing it, or shutting
    it down for writing, ends the run."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            _server.send([theirs.fileno(), stdin, stdout, stderr, said])
        ours.sendall(pickle.dumps(request))
    except BaseException:
        ours.close()
        raise
    return ours


_MAIN = "from ipfsfuse_run.forkserver import serve; serve"


# -- the server --------------------------------------------------------------------------------------------


def serve(file: int) -> None:
    """The server's main: until the program closes its end of the socket `file`, and the runs have ended that
    it left."""
    control = socket.socket(fileno=file)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import_all()
    gc.freeze()  # so that a forked process need not copy these pages
    poller = _Poller()
    poller.add(control.fileno(), select.POLLIN, lambda: _accept(control, poller))
    poller.loop()


class _Poller:
    """Descriptors, and what to call when something happens to them."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._calls: dict[int, Callable[[], None]] = {}

    def add(self, file: int, events: int, call: Callable[[], None]) -> None:
        self._poll.register(file, events)
        self._calls[file] = call

    def remove(self, file: int) -> None:
        if self._calls.pop(file, None) is not None:
            self._poll.unregister(file)

    def loop(self) -> None:
        """Until there is none."""
        while self._calls:
            for file, _events in self._poll.poll():
                if file in self._calls:
                    self._calls[file]()


def _accept(control: socket.socket, poller: _Poller) -> None:
    _message, files, _flags, _from = socket.recv_fds(control, 16, _FILES)
    if len(files) == _FILES:
        _begin(poller, files)
    else:
        poller.remove(control.fileno())


def _import_all() -> None:
    for name in ("code_cache", "command", "execute", "guest", "mounts"):
        import_module(f"ipfsfuse_run.{name}")
    import_module("tempfile")
    import_module("wasmtime.component")


def _begin(poller: _Poller, files: list[int]) -> None:
    pid = processes.fork(lambda: _run(files))
    run, *others = files
    for each in others:
        os.close(each)
    ended = os.pidfd_open(pid)

    def left() -> None:
        """The program has closed its end of the socket, or has ended."""
        poller.remove(run)
        signal.pidfd_send_signal(ended, signal.SIGTERM)

    def reap() -> None:
        os.waitpid(pid, 0)
        for each in (ended, run):
            poller.remove(each)
            os.close(each)

    poller.add(run, select.POLLRDHUP, left)
    poller.add(ended, select.POLLIN, reap)


def _run(files: list[int]) -> None:
    """In the run's own process. Raises Interrupted when the program has left."""
    processes.close_all_but(
        0, 1, 2, *files
    )  # else the sockets of other runs would be open until this one ends
    processes.raise_on_signals()
    run, stdin, stdout, stderr, said = files
    for file, target in ((stdin, 0), (stdout, 1), (stderr, 2)):
        os.dup2(file, target)
        os.close(file)
    sys.stderr = open(said, "w", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
    with socket.socket(fileno=run) as answers:
        with answers.makefile("rb") as asked:
            request: Request = pickle.load(asked)
        answers.sendall(json.dumps(_answer(request)).encode())


def _answer(request: Request) -> dict[str, Any]:
    from ipfsfuse_run.execute import execute

    os.environ.clear()
    os.environ.update(request.environment)
    try:
        os.chdir(request.cwd)
        return _as_json(execute(request.options))
    except NotKept as exc:
        return _as_json(exc.run) | {"not_kept": str(exc)}
    except IpfsFuseError as exc:
        return {"error": type(exc).__name__, "text": str(exc)}
    except Exception as exc:
        return {
            "error": "IpfsFuseError",
            "text": f"{request.options.guest} met a fault of the runner's: {exc!r}",
        }


def _as_json(run: "CompletedRun") -> dict[str, Any]:
    receipt = None if run.receipt is None else run.receipt.decode()
    return {"outcome": run.outcome._asdict(), "out": run.out, "receipt": receipt}
