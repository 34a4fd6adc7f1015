"""The wasmtime command as the guest's process: it gives the same results as the library, and is not used
where it would give others."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipfsfuse_run import command
from ipfsfuse_run.options import Dir, Options
from tests.mounting import Home, wait_until
from tests.runner.conftest import DEMO, GUESTS, Runner
from tests.runner.test_limits import slow

COPIES = """(module
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 1))
    (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 16)))
    (drop (call $environ (i32.const 1000) (i32.const 2000)))
    (i32.store (i32.const 0) (i32.const 2000)) (i32.store (i32.const 4) (i32.const 12))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))))"""
"""Waits for a byte, then writes the first 12 bytes of its variables."""


def module_with(body: str, more: str = "") -> str:
    return f"""(module
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32))) {more}
      (memory (export "memory") 1) (func (export "_start") {body}))"""


@pytest.fixture
def run(home: Home, tmp_path: Path, wasmtime: Path) -> Iterator[Runner]:
    with home.mounted() as mount:
        path = f"{wasmtime}{os.pathsep}{home.env.get('PATH', os.defpath)}"
        yield Runner({**home.env, "PATH": path, "XDG_CACHE_HOME": str(tmp_path / "xdg")}, mount.path)


def guest(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "guest.wat"
    path.write_text(text)
    return path


@pytest.mark.fuse
@pytest.mark.parametrize("name", ["reader-p1.wat", "reader-p2.wat"])
def test_both_engines_give_the_same_results(run: Runner, home: Home, tmp_path: Path, name: str) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("content\n")
    command = [DEMO / name, f"/ipfs/{home.add(tmp_path / 'tree')}/file"]
    results = {engine: run("-v", "--engine", engine, *command) for engine in ("library", "command", "auto")}
    assert {(each.returncode, each.stdout) for each in results.values()} == {(0, results["library"].stdout)}
    assert results["library"].stdout.startswith(b"content\n")
    assert b"Operation not permitted" in results["command"].stdout
    for engine, text in (("library", b"the library"), ("command", b"the command"), ("auto", b"the command")):
        assert text in results[engine].stderr, results[engine]


@pytest.mark.fuse
@pytest.mark.parametrize(
    ("text", "args", "code", "message"),
    [
        (module_with("(call $exit (i32.const 7))"), [], 7, b""),
        (module_with("(call $exit (i32.const 200))"), [], 1, b""),
        (module_with("unreachable"), [], 134, b"unreachable"),
        (module_with("(loop (br 0))"), ["-W", "timeout=500ms"], 124, b"ran out of time"),
        (module_with("(loop (br 0))"), ["-W", "fuel=100000"], 134, b"fuel"),
        (module_with("(drop (memory.grow (i32.const 64)))"), ["-W", "max-memory-size=1MiB"], 0, b""),
        ('(module (func (export "run")))', [], 125, b"exports no _start"),
        ('(module (import "a" "b" (func)) (func (export "_start")))', [], 125, b"unknown import: `a::b`"),
        ("(module (func (export", [], 125, b"not WebAssembly text"),
        ('(component (import "wasi:http/types@0.2.0" (instance)))', [], 125, b"not wasi:cli/run"),
        ('(component (import "wasi:cli/run@0.3.0" (instance)))', [], 125, b"preview 3 is not offered"),
    ],
)
def test_the_command_reports_how_a_guest_ended(
    run: Runner, tmp_path: Path, text: str, args: list[str], code: int, message: bytes
) -> None:
    done = run("--engine", "command", *args, guest(tmp_path, text))
    assert (done.returncode, message in done.stderr) == (code, True), done


@pytest.mark.fuse
def test_a_locked_guest_shows_no_variable_to_others(run: Runner, tmp_path: Path) -> None:
    """No command line has values of --env, every thread is locked, and only the needed descriptors are
    open."""
    command = ["--engine", "command", "--env", "KEY=hush-hush", guest(tmp_path, COPIES)]
    secret, other = os.pipe()
    os.set_inheritable(secret, True)
    with subprocess.Popen(
        run.command(*command),
        env=run.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[secret],
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

        def running() -> bool:
            return any(b"allow-precompiled" in cmdline(int(each)) for each in children.read_text().split())

        wait_until(running, "the command runs")
        (pid,) = map(int, children.read_text().split())
        seen = b"".join(cmdline(int(each)) for each in os.listdir("/proc") if each.isdigit())
        assert b"--env\0KEY\0" in cmdline(pid)
        assert b"hush-hush" not in seen.replace(cmdline(process.pid), b"")
        for each in os.listdir(f"/proc/{pid}/task"):
            status = Path(f"/proc/{pid}/task/{each}/status").read_text()
            for line in ("NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000"):
                assert line in status
        pipe = os.readlink(f"/proc/self/fd/{secret}")
        held = [os.readlink(f"/proc/{pid}/fd/{each}") for each in os.listdir(f"/proc/{pid}/fd")]
        assert pipe not in held
        process.stdin.write(b"x")
        process.stdin.close()
        assert process.stdout.read() == b"KEY=hush-hus"
    os.close(secret)
    os.close(other)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.fuse
def test_the_command_ends_with_a_killed_runner(run: Runner, tmp_path: Path) -> None:
    with run.start("--engine", "command", guest(tmp_path, module_with("(loop (br 0))"))) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(
            lambda: any(b"allow-precompiled" in cmdline(int(each)) for each in children.read_text().split()),
            "the command runs",
        )
        (pid,) = map(int, children.read_text().split())
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda: not cmdline(pid), "the command is gone")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (Options(record="run.car"), "--record"),
        (Options(dirs=(Dir("a", "b", writable=False),)), "read-only"),
        (Options(env=(("LD_PRELOAD", "x"),)), "LD_PRELOAD"),
        (Options(env=(("RUST_LOG", "x"),)), "RUST_LOG"),
        (Options(env=(("A", "x" * (128 << 10)),)), "--env A"),
        (Options(args=("x" * (128 << 10),)), "argument"),
    ],
)
def test_some_runs_need_the_library(options: Options, reason: str) -> None:
    assert reason in (command.unsuited(options) or "")
    assert command.unsuited(Options(dirs=(Dir("a", "b", writable=True),), env=(("A", "1"),))) is None


def test_the_command_must_be_a_program_that_others_can_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'none'}{os.pathsep}{tmp_path}")
    assert command.find()[1] == "there is no wasmtime on PATH"
    program = tmp_path / "wasmtime"
    program.write_bytes(Path("/bin/true").resolve().read_bytes())
    program.chmod(0o755)
    assert command.find() == (str(program), "")
    program.chmod(0o775)
    assert "may be written by others" in command.find()[1]
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert "a script" in command.find()[1]


@pytest.mark.fuse
def test_a_command_that_is_too_old_is_not_used(run: Runner, tmp_path: Path) -> None:
    program = tmp_path / "wasmtime"
    program.write_bytes(Path("/bin/true").resolve().read_bytes())
    program.chmod(0o755)
    run.env["PATH"] = f"{tmp_path}{os.pathsep}{run.env['PATH']}"
    path = guest(tmp_path, module_with("(call $exit (i32.const 7))"))
    assert run(path).returncode == 7
    done = run("--engine", "command", path)
    assert (done.returncode, b"older than version 49" in done.stderr) == (125, True)


@pytest.mark.fuse
def test_compile_keeps_the_code_for_later_runs(run: Runner, tmp_path: Path) -> None:
    path = guest(tmp_path, module_with("(call $exit (i32.const 7))"))
    code = Path(run.env["XDG_CACHE_HOME"]) / "ipfsfuse-run" / "code"
    for number, engine in enumerate(("command", "library"), 1):
        assert run_subcommand(run, "compile", "--engine", engine, path).returncode == 0
        assert len(list(code.iterdir())) == number
        assert run_subcommand(run, "run", "--engine", engine, path).returncode == 7
        assert len(list(code.iterdir())) == number
    assert run_subcommand(run, "compile", path, "argument").returncode == 2


@pytest.mark.fuse
def test_a_compilation_that_is_ended_leaves_no_process(run: Runner, tmp_path: Path) -> None:
    """Not even the command's compiler, which is a child of the compiling process."""
    command = run.command("--engine=command", slow(tmp_path, 3000))
    with subprocess.Popen(command, env=run.env, start_new_session=True) as process:
        wait_until(lambda: _compilers(process.pid), "the compiler runs")
        (compiler,) = _compilers(process.pid)
        os.kill(compiler, signal.SIGSTOP)  # so that it does not end by itself
        process.terminate()
        assert process.wait() == -signal.SIGTERM
    try:
        wait_until(lambda: not _compilers(process.pid), "the compiler is gone", 5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(compiler, signal.SIGKILL)


def _compilers(session: int) -> list[int]:
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, *fields = (each / "stat").read_text().rpartition(")")[2].split()
            command = (each / "cmdline").read_bytes()
            if int(fields[2]) == session and state != "Z" and command.startswith(b"wasmtime\0compile"):
                found.append(int(each.name))
    return found


@pytest.mark.fuse
@pytest.mark.parametrize("engine", ["library", "command"])
def test_a_guest_gets_no_socket_and_looks_up_no_name(run: Runner, engine: str) -> None:
    done = run("-v", f"--engine={engine}", GUESTS / "sockets-p2.wat")
    assert done.returncode == 0, done
    assert b"every call of wasi:sockets is refused" in done.stderr


def run_subcommand(run: Runner, subcommand: str, *args: str | Path) -> "subprocess.CompletedProcess[bytes]":
    command = run.command(*args)
    place = command.index("--mount")
    return subprocess.run(
        [*command[:place], subcommand, *command[place:]], env=run.env, capture_output=True, check=False
    )


def test_the_version(run: Runner) -> None:
    from ipfsfuse import __version__

    assert run("--version").stdout.decode() == f"ipfsfuse-run {__version__}\n"
