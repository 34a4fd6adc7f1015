"""The process that runs guests for a Python program. It has imported all modules that a run needs. For each
run it forks a supervisor, which does the same as the command.

The program itself is not forked, because it may have threads and secrets. Program and server talk over a
socket pair, which no other process can reach. The server ends when the program closes its end of the socket
pair; a run ends when the program closes the run's socket. The kernel closes both when the program ends. The
server has one thread.
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
"""Descriptors that come with a run: its socket, stdin, stdout, stderr, and a file for the runner's
messages."""


class Request(NamedTuple):
    """One run, as the program asks for it."""

    options: Options
    cwd: str
    environment: Mapping[str, str]


# -- the program's side ------------------------------------------------------------------------------------


class _Server:
    """The fork server of this process. A forked process starts one of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def send(self, files: list[int]) -> None:
        """Sends a run's descriptors to the server; starts the server if there is none. Raises OSError."""
        with self._lock:
            if self._owner == os.getpid() and self._control is not None:
                try:
                    socket.send_fds(self._control, [b"run"], files)
                    return
                except OSError:
                    self._control.close()  # the server was killed: start another one
            self._start()
            assert self._control is not None
            socket.send_fds(self._control, [b"run"], files)

    def _start(self) -> None:
        from ipfsfuse_run.mounts import child_environment

        if self._process is not None and self._owner == os.getpid():
            self._process.wait()  # its socket is closed, so it has ended or ends now
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
                start_new_session=True,  # Ctrl-C in the terminal goes to the program only, which ends the run
            )
        self._control, self._owner = ours, os.getpid()


_server = _Server()


def start(request: Request, stdin: int, stdout: int, stderr: int, said: int) -> socket.socket:
    """Starts a run. Returns a socket: all that can be read from it is the answer (`_answer`). Closing it, or
    shutting it down for writing, ends the run."""
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
    """The server's main function. Returns when the program has closed its end of the socket `file` and all
    runs have ended."""
    control = socket.socket(fileno=file)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import_all()
    gc.freeze()  # so that a forked process need not copy these pages
    poller = _Poller()
    poller.add(control.fileno(), select.POLLIN, lambda: _accept(control, poller))
    poller.loop()


class _Poller:
    """Calls a function when something happens to its descriptor."""

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
        """Returns when no descriptor is left."""
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
    """Runs in the run's own process. Raises Interrupted when the program has closed the run's socket."""
    # otherwise the sockets of other runs would stay open until this one ends
    processes.close_all_but(0, 1, 2, *files)
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
