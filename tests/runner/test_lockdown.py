"""The sandbox of the guest's process, tested by native code in place of the guest: what a guest that broke
out of wasmtime can't do."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ipfsfuse import confinement
from ipfsfuse_run import lockdown
from tests.mounting import Home
from tests.runner.conftest import TOP, Measured, Runner

ATTEMPT = """
tried = {}
def attempt(name, call):
    try:
        call()
        tried[name] = 0
    except OSError as exc:
        tried[name] = exc.errno
"""
"""Makes a call, and notes its errno under its name, or 0 if it succeeded."""

NATIVE = (
    ATTEMPT
    + """
import json, mmap, os, signal, socket, sys, threading, ctypes
from ipfsfuse_run import lockdown
from ipfsfuse.confinement import Access
given, writable, secret, port, control, code = sys.argv[1:]
def memory_of(pid):
    with open(f"/proc/{pid}/mem", "rb") as file:
        file.read(1)
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    if libc.syscall(number, *args) < 0:
        raise OSError(ctypes.get_errno(), "")
held = os.open(code, os.O_RDONLY)  # as the guest's process has it
active = lockdown.lock([
    Access(os.open(given, os.O_PATH)), Access(os.open(writable, os.O_PATH), write=True), Access(held),
])
attempt("read given", lambda: os.listdir(given))
attempt("write writable", lambda: open(writable + "/new", "w").close())
attempt("remove writable", lambda: os.remove(writable + "/new"))
attempt("write given", lambda: open(given + "/new", "w"))
attempt("read secret", lambda: open(secret).read())
attempt("list home", lambda: os.listdir(os.path.dirname(secret)))
attempt("chmod", lambda: os.chmod(given, 0o777))
attempt("run a program", lambda: os.execv("/bin/true", ["true"]))
attempt("fork", os.fork)
attempt("tcp", lambda: socket.create_connection(("127.0.0.1", int(port))))
attempt("udp", lambda: socket.socket(type=socket.SOCK_DGRAM))
attempt("control", lambda: socket.socket(socket.AF_UNIX).connect(control))
attempt("socketpair", socket.socketpair)
attempt("supervisor's memory", lambda: memory_of(os.getppid()))
attempt("ptrace", lambda: call(101, 16, os.getppid(), 0, 0))
attempt("kill", lambda: os.kill(os.getppid(), 0))
attempt("unshare", lambda: call(272, 0x10000000))
attempt("io_uring", lambda: call(425, 1, 0))
attempt("keys", lambda: call(250, 0, -3, 0))
attempt("read code", lambda: os.pread(held, 1, 0))
open(writable + "/poison", "w").close()
attempt("open code anew", lambda: os.open(f"/proc/self/fd/{held}", os.O_WRONLY))
attempt("write code", lambda: os.open(code, os.O_WRONLY))
attempt("map code", lambda: mmap.mmap(held, 1, mmap.MAP_SHARED, mmap.PROT_WRITE))
attempt("cut code", lambda: os.truncate(code, 0))
attempt("remove code", lambda: os.unlink(code))
attempt("replace code", lambda: os.rename(writable + "/poison", code))
attempt("link other code", lambda: os.link(writable + "/poison", code + "0"))
attempt("make other code", lambda: os.open(code + "0", os.O_WRONLY | os.O_CREAT))
attempt("list the code", lambda: os.listdir(os.path.dirname(code)))
attempt("let others write code", lambda: os.chmod(code, 0o666))
attempt("let others write code (open)", lambda: os.fchmod(held, 0o666))
attempt("exchange the folder", lambda: os.rename(os.path.dirname(code), os.path.dirname(code) + "0"))
started = []
thread = threading.Thread(target=lambda: started.append(1))
thread.start()
thread.join()
print(json.dumps([active, tried, started]))
"""
)

FULL = pytest.mark.skipif(
    confinement.landlock_abi() < 4 or lockdown.seccomp_filter(os.uname().machine, 1) is None,
    reason="needs landlock version 4 in the kernel, and a machine that the seccomp filter supports",
)


@FULL
@pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="the system call numbers in the test are for x86-64"
)
def test_native_code_in_place_of_the_guest_is_confined(tmp_path: Path) -> None:
    """It can read the compiled code that it was given. It can change neither that code nor other code in the
    cache."""
    code = tmp_path / "code" / "entry"
    code.parent.mkdir(mode=0o700)
    code.write_bytes(b"compiled")
    code.chmod(0o600)
    given, writable, secret = tmp_path / "given", tmp_path / "writable", tmp_path / "secret"
    given.mkdir()
    writable.mkdir()
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as control:
        control.bind(str(tmp_path / "control"))
        control.listen()
        done = subprocess.run(
            [
                *(sys.executable, "-c", NATIVE, given, writable, secret),
                *(str(server.getsockname()[1]), tmp_path / "control", code),
            ],
            env={**os.environ, "PYTHONPATH": f"{TOP}:{TOP / 'runner'}"},
            capture_output=True,
            check=True,
        )
    active, tried, started = json.loads(done.stdout)
    assert active == list(lockdown.LAYERS)
    allowed = {"read given", "write writable", "remove writable", "socketpair", "read code"}
    assert {name for name, error in tried.items() if error == 0} == allowed, tried
    assert started == [1]
    assert [each.name for each in code.parent.iterdir()] == ["entry"]
    assert (code.read_bytes(), code.stat().st_mode & 0o777) == (b"compiled", 0o600)


COMPILER = (
    ATTEMPT
    + """
import ctypes, json, os, socket, sys
from pathlib import Path
from ipfsfuse_run import guest
from ipfsfuse_run.code_cache import CodeCache
folder, secret, out = map(Path, sys.argv[1:4])
standard = int(sys.argv[4])
libc = ctypes.CDLL(None, use_errno=True)
entry = folder / ("b" * 64 + "-" + "c" * 16)
def attacker(engine, kind, code, name):
    attempt("read another's code", lambda: os.open(entry, os.O_RDONLY))
    attempt("write another's code", lambda: os.open(entry, os.O_WRONLY))
    attempt("cut another's code", lambda: os.truncate(entry, 0))
    attempt("remove another's code", lambda: os.unlink(entry))
    attempt("make code", lambda: os.open(folder / ("d" * 64 + "-" + "c" * 16), os.O_WRONLY | os.O_CREAT))
    attempt("list the code", lambda: os.listdir(folder))
    attempt("let others write code", lambda: os.chmod(entry, 0o666))
    attempt("read secret", lambda: open(secret))
    attempt("write the output", lambda: os.write(standard, b"x"))
    attempt("fork", os.fork)
    attempt("socket", lambda: socket.socket(socket.AF_UNIX))
    attempt("signal", lambda: os.kill(os.getppid(), 0))
    held = [each for each in range(3, 100) if os.path.exists(f"/proc/self/fd/{each}")]
    class Compiled:
        def serialize(self):
            return json.dumps([tried, len(held)]).encode()
    return guest.Guest(name, engine, Compiled())
guest.compile_guest = attacker
settings = guest.Settings(False, None, False)
engine, cache = guest.make_engine(settings), CodeCache(folder)
build = lambda: guest.build(engine, "module", b"its own", "evil")
made = cache.compiled("module", b"its own", "evil", 1 << 32, guest.key(settings), build)
out.write_bytes(os.pread(made.file, 10000, 0))
"""
)


@FULL
def test_native_code_in_place_of_the_compiler_is_confined(tmp_path: Path) -> None:
    """It can return code for the module that broke the compiler, under that module's key. It reaches nothing
    else."""
    folder, secret, out = tmp_path / "code", tmp_path / "secret", tmp_path / "out"
    folder.mkdir(mode=0o700)
    secret.write_text("secret")
    entry = folder / f"{'b' * 64}-{'c' * 16}"
    entry.write_bytes(b"another's code")
    entry.chmod(0o600)
    with (tmp_path / "stdout").open("wb") as stdout:
        subprocess.run(
            [sys.executable, "-c", COMPILER, folder, secret, out, str(stdout.fileno())],
            env={**os.environ, "PYTHONPATH": f"{TOP}:{TOP / 'runner'}"},
            stdout=stdout,
            pass_fds=[stdout.fileno()],
            check=True,
        )
    tried, held = json.loads(out.read_bytes())
    assert {name for name, error in tried.items() if error == 0} == set(), tried
    assert held == 2  # for the code, and for the reason of a refusal
    assert (tmp_path / "stdout").read_bytes() == b""
    (own,) = (each for each in folder.iterdir() if each != entry)
    assert own.name.startswith(hashlib.sha256(b"its own").hexdigest())
    assert (entry.read_bytes(), entry.stat().st_mode & 0o777) == (b"another's code", 0o600)


LOADS = """
import ctypes, sys
from ipfsfuse_run import cli, guest
real, prctl = guest.load, ctypes.CDLL(None).prctl
def load(engine, code):
    print("seccomp", prctl(21, 0, 0, 0, 0), flush=True)
    return real(engine, code)
guest.load = load
cli.main(sys.argv[1:])
"""


@FULL
@pytest.mark.parametrize("cache", ["kept", "none"])
def test_compiled_code_is_loaded_after_the_process_is_locked(run: Runner, tmp_path: Path, cache: str) -> None:
    """A module that broke the compiler may have made the code. Without a cache, the code is in memory."""
    guest = tmp_path / "guest.wat"
    guest.write_text('(module (func (export "_start")))')
    if cache == "none":
        run.env["XDG_CACHE_HOME"] = str(tmp_path / "file")
        (tmp_path / "file").touch()
    options = ["--engine=library", "--require-sandbox", "--dir", f"{tmp_path}::/", "--tmp=0"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", LOADS, *options, "--mount", str(run.mount), str(guest)],
            env=run.env,
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, b"seccomp 2\n"), done


@FULL
def test_a_guest_in_the_library_is_locked_too(run: Runner, tmp_path: Path) -> None:
    guest = tmp_path / "guest.wat"
    guest.write_text('(module (func (export "_start")))')
    done = run("-v", "--require-sandbox", guest)
    assert done.returncode == 0
    assert b"the library, locked by no_new_privs, capabilities, landlock, seccomp" in done.stderr


def test_a_missing_layer_is_named_and_can_be_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipfsfuse_run import child
    from ipfsfuse_run.errors import GuestRefused
    from ipfsfuse_run.options import Options
    from ipfsfuse_run.sandbox import Sandbox

    monkeypatch.setattr(lockdown, "lock", lambda _allowed: ["no_new_privs", "seccomp"])
    options = Options("guest", verbose=True)
    plan = child.Plan(options, "/", Sandbox(["guest"], [], [], None))
    read_end, write_end = os.pipe()
    child._lock(plan, [], [], "the library", child.Reports(write_end))
    assert b"without capabilities, landlock" in os.read(read_end, 1000)
    plan = plan._replace(options=options._replace(require_sandbox=True))
    with pytest.raises(GuestRefused, match="this machine lacks capabilities, landlock"):
        child._lock(plan, [], [], "the library", child.Reports(write_end))
    os.close(read_end)
    os.close(write_end)


def test_the_memory_of_a_compilation_is_bounded(run: Runner, tmp_path: Path) -> None:
    guest = tmp_path / "guest.wat"
    functions = "".join(
        f'(func (export "f{n}") (param i32) (result i32) (i32.add (local.get 0) (i32.const {n})))'
        for n in range(3000)
    )
    guest.write_text(f'(module (func (export "_start")) {functions})')
    done = run("-W", "compile-memory=28MiB", guest)
    assert done.returncode == 125
    assert b"compile-memory=SIZE" in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert run(guest).returncode == 0


REPORTS = """
import os, sys
from ipfsfuse_run import child, cli
kind = sys.argv.pop(1)
def broken_out(plan, reports):
    reports.send({"growth": []})
    if kind == "nothing":
        sys.stdin.read()
    if kind not in ("growth", "compiling"):
        reports.send({"started": True})
    if kind == "endless":
        while True:
            os.write(reports.file, bytes(1 << 16))
    os.write(reports.file, {
        "deep": b"[" * 100_000,
        "no JSON": b"\\xff\\xfe",
        "no object": b"5",
        "forged": b'{"says": "results /ipfs/forged"}',
        "again": b'{"started": true}',
        "growth": b'{"growth": [["max_out", ["/"], [0, 0], 1]]}',
        "compiling": b'{"compiling": false}',
        "no text": b'{"ended": 0, "trap": 5}',
    }[kind] + b"\\n")
    sys.stdin.read()
child._run = broken_out
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "kind", ["endless", "deep", "no JSON", "no object", "forged", "again", "growth", "compiling", "no text"]
)
def test_bad_reports_of_a_guest_that_broke_out_only_end_its_run(
    run: Runner, tmp_path: Path, kind: str
) -> None:
    """The run ends with one line that the runner wrote, and uses little memory."""
    command = [sys.executable, "-c", REPORTS, kind, "--mount", str(run.mount), "guest"]
    done = Measured(command, run.env)
    assert done.code == 134
    assert done.err == "ipfsfuse-run: guest was ended: its process reported what can't be understood\n"
    assert done.memory < 150 << 20


def test_code_that_never_begins_is_ended(run: Runner) -> None:
    options = ["-W", "compile-timeout=300ms", "--mount", str(run.mount), "guest"]
    with subprocess.Popen(
        [sys.executable, "-c", REPORTS, "nothing", *options],
        env=run.env,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        assert b"was not compiled within 0.3s" in process.stderr.read()
        assert process.wait() == 125


def test_the_memory_of_a_translation_is_bounded(run: Runner, tmp_path: Path) -> None:
    """The translation of text takes many times the size of the text."""
    guest = tmp_path / "guest.wat"
    guest.write_text('(module (func (export "_start"))' + "(func)" * 500_000 + ")")
    done = Measured(run.command("-W", "compile-memory=64MiB", guest), run.env)
    assert (done.code, "compile-memory=SIZE" in done.err) == (125, True), done.err
    assert done.memory < 150 << 20


@FULL
def test_doctor_names_the_layers(home: Home) -> None:
    found = {each["about"]: each for each in json.loads(home.run("doctor", "--json").stdout)}
    assert found["guests"]["found"].startswith(
        "locked in by no_new_privs, capabilities, landlock, seccomp; /tmp is a "
    )


READS = "import sys; open(f'/proc/{sys.argv[1]}/mem', 'rb').close()"
DAEMON = "import sys; from ipfsfuse import confinement; confinement.hide_memory(); print('hidden', flush=True); sys.stdin.read()"
NO_CAPS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
"""With root's capabilities a process can read every memory. Without them it can't read that of a process
which has them."""


def may_read(pid: int) -> bool:
    """Whether another process of this user may read the memory of `pid`."""
    done = subprocess.run(
        [*NO_CAPS, sys.executable, "-c", READS, str(pid)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or "PermissionError" in done.stderr, done
    return done.returncode == 0


def test_the_memory_of_daemon_and_supervisor_is_hidden(run: Runner, habits: Path) -> None:
    with subprocess.Popen([*NO_CAPS, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(b"begun\n")
        other.stdin.flush()
        other.stdout.readline()
        if not may_read(other.pid):
            pytest.skip("this machine lets no process read another's memory (kernel.yama.ptrace_scope)")
        other.stdin.close()
    for command in ([sys.executable, "-c", DAEMON], run.command(habits, "spin")):
        with subprocess.Popen(
            [*NO_CAPS, *command], env=run.env, cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() in (b"hidden\n", b"spinning\n")
            assert not may_read(process.pid)
            process.terminate()
