"""Runs from Python give the same results as the command, as values and exceptions, also in a process with
threads."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

import ipfsfuse_run
from ipfsfuse.errors import IpfsFuseError, UsageError
from tests.mounting import PATIENCE, Home, alive, wait_until
from tests.runner.conftest import Runner, lines
from tests.runner.test_results import key_pair

EMPTY = '(module (func (export "_start")))'
SPIN = '(module (func (export "_start") (loop (br 0))))'
TRAP = '(module (func (export "_start") unreachable))'

Run = Callable[..., ipfsfuse_run.Result]


@pytest.fixture
def python(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`ipfsfuse_run.run` on the folder `tree`, with its own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    def run(guest: str | Path, *args: str, **options: Any) -> ipfsfuse_run.Result:
        return ipfsfuse_run.run(guest, *args, **{"mount": tree, **options})

    return run


def guest(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "guest.wat"
    path.write_text(text)
    return path


def children(pid: int) -> list[int]:
    """The children of the process `pid`, and all their descendants. Threads and processes may end
    meanwhile."""
    own: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError):
                own += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return own + [below for each in own for below in children(each)]


def test_a_run_returns_while_a_later_one_still_runs(python: Run, habits: Path) -> None:
    before = len(children(os.getpid()))
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        ends, runs = [], []
        for number in range(2):
            stdin, write = (
                stack.enter_context(open(file, mode))
                for file, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
            )
            ends.append(write)
            runs.append(pool.submit(python, habits, "cat", stdin=stdin))
            least = before + 2 * (1 + number)  # its supervisor and its guest
            wait_until(lambda least=least: len(children(os.getpid())) >= least, "the run has started")
        for write, run in zip(ends, runs, strict=True):
            write.close()
            assert run.result(PATIENCE).exit_code == 0


def test_a_guest_gets_its_input_and_its_output_is_returned(python: Run, habits: Path, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    done = python(habits, "args", "--env", "B=2")
    assert lines(done.stdout) == ["habits.wasm", "args", "--env", "B=2"]
    assert lines(python(habits, "env", env={"A": "1=2"}).stdout) == ["A=1=2"]
    data = bytes(range(256)) * 1000
    assert python(habits, "cat", stdin=data).stdout == data
    assert python(habits, "cat").stdout == b""
    with (tmp_path / "input").open("wb+") as file:
        file.write(b"from a file")
        file.seek(0)
        assert python(habits, "cat", stdin=file).stdout == b"from a file"
    assert python(habits, "err").stderr == b"to stderr\n"
    assert python(habits, "cat", "file", cwd="/ipfs/root").stdout == b"content\n"
    done = python(habits, "write", "/data/one", dirs=[f"{tmp_path}/given::/data"])
    assert (done.exit_code, (tmp_path / "given" / "one").read_text()) == (0, "written\n")
    done = python(habits, "exit", "3")
    assert (done.exit_code, done.ended, done.reason) == (3, "exited", "")
    with pytest.raises(ipfsfuse_run.GuestFailed, match="exited with 3") as caught:
        done.check()
    assert caught.value.result is done
    with pytest.raises(AttributeError):
        done.exit_code = 0  # type: ignore[misc] # that is the test


@pytest.mark.parametrize(
    ("text", "limits", "code", "ended", "limit"),
    [
        (TRAP, {}, 134, "trapped", None),
        (SPIN, {"timeout": 0.3}, 124, "timeout", "timeout"),
        (SPIN, {"timeout": "300ms"}, 124, "timeout", "timeout"),
        (SPIN, {"fuel": 1000}, 134, "trapped", None),
    ],
)
def test_a_run_that_fails_gives_the_same_reason_as_the_command(
    python: Run,
    run: Runner,
    tmp_path: Path,
    text: str,
    limits: dict[str, Any],
    code: int,
    ended: str,
    limit: str | None,
) -> None:
    path = guest(tmp_path, text)
    done = python(path, limits=limits)
    assert (done.exit_code, done.ended, done.limit, done.notes) == (code, ended, limit, ())
    options = [f"-W{name}={value}{'s' if type(value) is float else ''}" for name, value in limits.items()]
    command = run(*options, path)
    assert command.returncode == code
    assert lines(command.stderr)[0] == f"ipfsfuse-run: {done.reason}"


def test_too_much_output_ends_a_run(python: Run, habits: Path) -> None:
    done = python(habits, "cat", stdin=b"x" * 5000, limits={"max_stdout": "1KiB"})
    assert (done.exit_code, done.ended, done.limit, done.stdout) == (134, "limit", "max_stdout", b"x" * 1024)
    assert done.reason == "the guest wrote more than max-stdout=1KiB to standard output"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"guest": "/nothing"}, ipfsfuse_run.GuestRefused, "/nothing can't be read: No such file"),
        ({"mount": "/nothing"}, ipfsfuse_run.GuestRefused, "the folder /nothing can't be opened"),
        ({"limits": {"frobs": 1}}, UsageError, "frobs is not a limit"),
        ({"limits": {"timeout": "soon"}}, UsageError, "timeout"),
        ({"limits": {"timeout": float("nan")}}, UsageError, "timeout"),
        ({"allow": ["x"]}, UsageError, "--allow can't go with it"),
        ({"env": {"A=": "x"}}, UsageError, "not the name of a variable"),
        ({"env": {"A": 1}}, UsageError, "is not a text"),
        ({"cwd": "relative"}, UsageError, "must be absolute"),
        ({"dirs": ["a::b::c::d"]}, UsageError, "is not HOST"),
        ({"engine": "other"}, UsageError, "engine"),
        ({"args": ["\0"]}, UsageError, "null byte"),
        ({"frobs": 1}, TypeError, "no keyword 'frobs'"),
    ],
)
def test_a_run_that_can_not_be_started_raises_an_error(
    python: Run, tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    keywords = dict(arguments)
    name, args = keywords.pop("guest", guest(tmp_path, EMPTY)), keywords.pop("args", [])
    with pytest.raises(error, match=message) as caught:
        python(name, *args, **keywords)
    assert "\n" not in str(caught.value)


def test_the_guests_process_gets_no_files_sockets_or_messages_of_the_program(
    python: Run, habits: Path, tmp_path: Path
) -> None:
    """It has no file that the program left open for its children, not the socket over which the result is
    sent, and not the file of the runner's messages."""
    for each in children(os.getpid()):
        if b"forkserver" in _cmdline(each):  # the next one is started while the file is open
            os.kill(each, signal.SIGKILL)
            wait_until(lambda each=each: not alive(each), "the server is gone")
    with (tmp_path / "of the program").open("wb") as kept:
        os.set_inheritable(kept.fileno(), True)
        python(habits, "args", engine="library")  # so that the code is compiled
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(python, habits, "spin", limits={"timeout": 1.5}, engine="library")
            wait_until(lambda: any(_runs_guest(each) for each in children(os.getpid())), "the guest runs")
            (pid,) = (each for each in children(os.getpid()) if _runs_guest(each))
            held = {
                int(each): os.readlink(f"/proc/{pid}/fd/{each}") for each in os.listdir(f"/proc/{pid}/fd")
            }
            assert running.result().ended == "timeout"
    assert not any(each.startswith("socket:") for each in held.values()), held
    assert "said" not in str(held)
    assert kept.name not in held.values()


def _runs_guest(pid: int) -> bool:
    try:
        return alive(pid) and "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_hundred_runs_at_once_keep_their_limits_and_leave_nothing(
    python: Run, habits: Path, tmp_path: Path
) -> None:
    python(habits, "args")
    spinning, before = guest(tmp_path, SPIN), sorted(os.listdir("/proc/self/fd"))

    def one(number: int) -> tuple[str, bytes]:
        if number % 5 == 0:
            return python(spinning, limits={"timeout": 0.5}).ended, b""
        done = python(habits, "cat", stdin=b"%d" % number)
        return done.ended, done.stdout

    with ThreadPoolExecutor(100) as pool:
        results = list(pool.map(one, range(100)))
    assert results == [("timeout", b"") if each % 5 == 0 else ("exited", b"%d" % each) for each in range(100)]
    (server,) = [each for each in children(os.getpid()) if b"forkserver" in _cmdline(each)][:1]
    wait_until(lambda: not children(server), "the runs are gone")
    assert sorted(os.listdir("/proc/self/fd")) == before


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_cancelled_run_in_trio_has_ended(python: Run, tree: Path, tmp_path: Path) -> None:
    spinning = guest(tmp_path, SPIN)
    assert python(spinning, limits={"timeout": 0.1}).ended == "timeout"  # so that the code is compiled

    async def one() -> None:
        await ipfsfuse_run.run_trio(spinning, mount=tree)

    async def main() -> bool:
        with trio.move_on_after(0.5) as scope:
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(one)
        done = await ipfsfuse_run.run_trio(spinning, mount=tree, limits={"timeout": 0.1})
        return scope.cancelled_caught and done.ended == "timeout"

    assert trio.run(main)
    assert not [each for each in children(os.getpid()) if _runs_guest(each)]


PROGRAM = """
import os, sys, threading, ipfsfuse_run
threading.Thread(target=ipfsfuse_run.run, args=[sys.argv[1]], kwargs={"mount": sys.argv[2]}).start()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_runs_of_a_killed_program_end_with_it(
    run: Runner, tree: Path, tmp_path: Path, number: int
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, guest(tmp_path, SPIN), tree], env=run.env
    ) as program:
        wait_until(lambda: any(_runs_guest(each) for each in children(program.pid)), "the guest runs")
        processes = children(program.pid)
        program.send_signal(number)
    wait_until(lambda: not any(alive(each) for each in processes), "all its processes have ended")


def test_a_killed_server_is_started_again_and_a_fork_has_its_own(python: Run, tmp_path: Path) -> None:
    path = guest(tmp_path, EMPTY)
    python(path)
    (server,) = [each for each in children(os.getpid()) if b"forkserver" in _cmdline(each)]
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not alive(server), "the server is gone")
    assert python(path).exit_code == 0
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(40 + python(path).exit_code)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 40
    assert python(path).exit_code == 0


def test_a_killed_run_is_reported_as_killed(python: Run, habits: Path) -> None:
    python(habits, "args", engine="library")  # so that the code is compiled
    with ThreadPoolExecutor(1) as pool:
        for parent in (False, True):
            running = pool.submit(python, habits, "spin", engine="library")
            wait_until(lambda: any(_runs_guest(each) for each in children(os.getpid())), "the guest runs")
            (pid,) = (each for each in children(os.getpid()) if _runs_guest(each))
            stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            os.kill(int(stat[1]) if parent else pid, signal.SIGKILL)
            if parent:
                with pytest.raises(IpfsFuseError, match="was killed, and its guest with it"):
                    running.result()
            else:
                done = running.result()
                assert (done.exit_code, done.ended) == (137, "killed")
                assert done.reason == f"{habits} was ended by SIGKILL"


ADD = """(module (import "lib" "twice" (func $twice (param i32) (result i32)))
(func (export "quadruple") (param i32) (result i32) (call $twice (call $twice (local.get 0)))))"""
LIB = '(module (func (export "twice") (param i32) (result i32) (i32.mul (local.get 0) (i32.const 2))))'


def test_a_function_is_called_by_name(python: Run, tmp_path: Path) -> None:
    path, library = guest(tmp_path, ADD), tmp_path / "lib.wat"
    library.write_text(LIB)
    done = python(path, "5", invoke="quadruple", preload={"lib": library})
    assert (done.exit_code, done.stdout) == (0, b"20\n"), done
    with pytest.raises(UsageError, match="--record of a run with --invoke"):
        python(path, "5", invoke="quadruple", record="run.car", mount=None)


@pytest.mark.fuse
def test_the_result_has_the_cid_of_the_results_and_the_receipt(
    home: Home, run: Runner, habits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the same as those of the folder, of the command and of the file."""
    for name, value in {**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg")}.items():
        monkeypatch.setenv(name, value)
    private, public = key_pair(tmp_path, "key")
    out, record = tmp_path / "out", tmp_path / "run.car"
    done = ipfsfuse_run.run(
        habits, "write", "/out/file", out=out, record=record, sign=private, limits={"timeout": 20}
    )
    assert (done.exit_code, (out / "file").read_text(), done.notes) == (0, "written\n", ())
    assert done.out == home.add("--hidden", out)
    assert done.receipt is not None
    assert done.receipt["results"]["out"] == done.out
    run.mount = None
    shown = run("inspect", record, "--json", "--key", public)
    assert (shown.returncode, json.loads(shown.stdout)) == (0, done.receipt), shown
    again = ipfsfuse_run.run(habits, "write", "/out/file", out=tmp_path / "again", add=True)
    assert (again.out, again.receipt, again.notes) == (done.out, None, ())
    assert done.out in home.run("library").stdout
    done = ipfsfuse_run.run(habits, "args")
    assert (done.out, done.receipt) == (None, None)


@pytest.mark.fuse
def test_the_error_for_results_that_can_not_be_kept_has_the_result(
    python: Run, habits: Path, run: Runner, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a library")
    monkeypatch.setenv("IPFSFUSE_LIBRARY", str(tmp_path / "file"))
    out = tmp_path / "out"
    with pytest.raises(ipfsfuse_run.ResultsNotKept, match="can't be taken into the library") as caught:
        python(habits, "write", "/out/file", out=out, add=True)
    done = caught.value.result
    assert (done.exit_code, done.ended, done.out) == (0, "exited", None)
    assert (out / "file").read_text() == "written\n"
    for name, value in home.env.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run.car").mkdir()
    with pytest.raises(ipfsfuse_run.ResultsNotKept, match=r"run\.car can't be written") as caught:
        ipfsfuse_run.run(habits, "err", record=tmp_path / "run.car")
    assert (caught.value.result.stderr, caught.value.result.receipt) == (b"to stderr\n", None)
    with pytest.raises(UsageError, match="there is no folder /nowhere"):
        ipfsfuse_run.run(habits, "err", record="/nowhere/run.car")
    run.env["IPFSFUSE_LIBRARY"] = str(tmp_path / "file")
    command = run("--engine=library", "--out", tmp_path / "results", "--add", guest(tmp_path, TRAP))
    messages = [each for each in lines(command.stderr) if each.startswith("ipfsfuse-run: ")]
    assert (command.returncode, len(messages)) == (125, 2), messages
    assert f"{tmp_path}/guest.wat trapped" in messages[0]
    assert "can't be taken into the library" in messages[1]
