"""The `wasmtime` command as the guest's process, in place of the library.

wasmtime-wasi passes each file call to another thread, which takes 20 to 40 us, unless
`allow_blocking_current_thread` is set. The command sets it when it has no `-W timeout`. The C library that
the Python package loads has no function for it. The supervisor enforces the time limit, so the command needs
none.
"""

import os
import re
import stat
import sys
from collections.abc import Sequence
from typing import NoReturn

from ipfsfuse.confinement import Access
from ipfsfuse.errors import UsageError
from ipfsfuse_run import limits, lockdown, processes
from ipfsfuse_run.code_cache import Key, entry_key
from ipfsfuse_run.errors import GuestRefused, say
from ipfsfuse_run.limits import Limits
from ipfsfuse_run.options import Options
from ipfsfuse_run.sandbox import OpenFolder, Sandbox

MIN_VERSION = 49
MAX_ARGUMENT = 128 << 10
"""Linux refuses an argument, or a variable with its name, of this many bytes (execve(2))."""

_STEERING = re.compile("(LD_|RUST|RAYON|XDG_|TOKIO|WASMTIME|MALLOC_|GLIBC_|GCONV_).*")
"""Variables that the command or the loader would act on."""
_INTERPRETER = re.compile(rb"/lib[^\0]{0,60}/ld-[^\0]{1,60}")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_FIBER_SPARE = 2 << 20


class TooOld(Exception):
    """The command's version is below MIN_VERSION."""


def choose(options: Options, in_our_mount: bool) -> str | None:
    """The wasmtime command that runs the guest; None for the library. Raises UsageError."""
    path, why = None, unsuited(options)
    if why is None and not in_our_mount:
        why = "the command has no read-only folders: --mount of a folder that is no mount needs the library"
    if why is None:
        path, why = find()
    if path is None and options.engine == "command":
        raise UsageError(f"--engine command: {why}")
    if path is None and options.verbose:
        say(f"the library runs this guest: {why}")
    return path


def find() -> tuple[str | None, str]:
    """The first `wasmtime` on PATH if it can be trusted to run a guest, else None and the reason."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        path = os.path.join(folder, "wasmtime")
        if os.path.isabs(path) and os.path.isfile(path) and os.access(path, os.X_OK):
            path = os.path.realpath(path)
            found = os.stat(path)
            if found.st_uid not in (0, os.geteuid()):
                return None, f"{path} belongs to another user"
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None, f"{path} may be written by others"
            with open(path, "rb") as file:
                if file.read(4) != b"\x7fELF":
                    return None, f"{path} is not a program but a script"
            return path, ""
    return None, "there is no wasmtime on PATH"


def unsuited(options: Options) -> str | None:
    """Why this run needs the library; None if the command can run it."""
    if options.record is not None or options.deterministic:
        return "--record and --deterministic need the library"
    if options.invoke is not None or options.preload:
        return "--invoke and --preload need the library"
    if any(not each.writable for each in options.dirs):
        return "the command has no read-only folders: --dir with ::ro needs the library"
    if any("::" in text for each in options.dirs for text in (each.host, each.guest)):
        return "the command splits names of folders at ::"
    if "," in (options.cwd or ""):
        return "the command splits --cwd at commas"
    for name, value in options.env:
        if _STEERING.fullmatch(name):
            return f"--env {name} would steer the command itself"
        if len(name.encode()) + len(value.encode()) + 2 >= MAX_ARGUMENT:
            return f"--env {name} is longer than the system passes to a command"
    if any(len(each.encode()) + 1 >= MAX_ARGUMENT for each in options.args):
        return "an argument is longer than the system passes to a command"
    return None


def key(command: str, given: Limits) -> Key:
    """How entries in the code cache are named."""
    found = os.stat(command)
    # the code is the same for any amount of fuel
    fixed = [re.sub("fuel=.*", "fuel", each) for each in _engine_options(given)]
    return lambda digest, kind: entry_key(digest, found, ("command", kind, *fixed))


def check_version(command: str) -> None:
    """Raises TooOld."""
    import subprocess

    said = subprocess.run(
        [command, "--version"], env={}, stdin=subprocess.DEVNULL, capture_output=True, check=False
    ).stdout
    found = re.match(rb"wasmtime ([0-9]+)\.", said)
    if found is None or int(found[1]) < MIN_VERSION:
        raise TooOld


def build(command: str, given: Limits, kind: str, data: bytes, name: str) -> bytes:
    """Compiles in the compiling process. First the command runs in a locked process, then the library checks
    the guest in this process, which is locked for it. Raises GuestRefused."""
    from ipfsfuse_run import guest

    source, made, errors_file = (os.memfd_create(each) for each in ("guest", "code", "errors"))
    with open(source, "wb", closefd=False) as out:
        out.write(data)

    def compile_it() -> None:
        os.dup2(errors_file, 2)
        for each in (source, made):
            os.set_inheritable(each, True)
        lockdown.lock(_program_files(command))
        paths = f"/proc/self/fd/{made}", f"/proc/self/fd/{source}"
        os.execve(
            command, ["wasmtime", "compile", "-C", "cache=n", *_engine_options(given), "-o", *paths], {}
        )

    _pid, status = os.waitpid(processes.fork(compile_it), 0)
    with open(made, "rb") as code, open(errors_file, "rb") as errors:
        if os.WIFSIGNALED(status):  # most likely memory ran out: the waiting process says so
            os._exit(1)
        if status:
            errors.seek(0)
            said = " ".join(errors.read(4096).decode(errors="replace").split())
            raise GuestRefused(f"{name} is not a valid WebAssembly {kind}: {said or 'the command failed'}")
        guest.form_of(kind)  # imports what is needed, before the lock prevents it
        lockdown.lock([])
        guest.check(kind, data, name)
        code.seek(0)
        return code.read()


def _engine_options(given: Limits) -> list[str]:
    """Arguments for compiling and for running."""
    options = [] if given.fuel is None else ["-W", f"fuel={given.fuel}"]
    if given.max_wasm_stack is not None:
        stack = given.max_wasm_stack
        options += ["-W", f"max-wasm-stack={stack},async-stack-size={stack + _FIBER_SPARE}"]
    return options


def arguments(box: Sandbox, given: Limits, folders: Sequence[OpenFolder], code: int) -> list[str]:
    """The command line. It has only the names of variables: their values are in the environment, because
    others can read a command line."""
    found = ["wasmtime", "run", "-C", "cache=n", "--allow-precompiled", *_engine_options(given)]
    for field in limits.STORE_LIMITS:
        value = getattr(given, field)
        if value is not None:
            found += ["-W", f"{limits.option(field)}={value}"]
    for each in folders:
        found += ["--dir", f"{each.path}::{each.guest}"]
    for name in box.variables:
        found += ["--env", name]
    if box.cwd is not None:
        found += ["-S", f"cwd={box.cwd}"]
    return [*found, "--argv0", box.argv[0], f"/proc/self/fd/{code}", *box.argv[1:]]


def allowed(command: str, code: int) -> list[Access]:
    """The files that the command needs to read and execute, besides the guest's folders."""
    return [*_program_files(command), Access(code)]


def _program_files(command: str) -> list[Access]:
    found = [Access(os.open(command, os.O_PATH | os.O_CLOEXEC), execute=True)]
    with open(command, "rb") as file:
        loader = _INTERPRETER.search(file.read(4096))
    if loader is not None:
        found.append(Access(os.open(os.fsdecode(loader[0]), os.O_PATH | os.O_CLOEXEC), execute=True))
    for path in _LIBRARIES:
        try:
            found.append(Access(os.open(path, os.O_PATH | os.O_CLOEXEC)))
        except OSError:
            pass  # other systems have it elsewhere
    return found


def execute(command: str, box: Sandbox, given: Limits, folders: Sequence[OpenFolder], code: int) -> NoReturn:
    """Replaces this process, which is already locked, by the command. Raises GuestRefused."""
    for each in (code, *(folder.file for folder in folders)):
        os.set_inheritable(each, True)
    if given.max_wasm_stack is not None:
        processes.deepen_stack(given.max_wasm_stack + _FIBER_SPARE)
    sys.stderr.flush()
    try:
        os.execve(command, arguments(box, given, folders, code), box.variables)
    except OSError as exc:
        raise GuestRefused(f"the command {command} can't be run: {exc.strerror}") from exc
