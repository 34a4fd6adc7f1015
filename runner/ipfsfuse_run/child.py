"""The guest's process, from the fork to its end. It reports to its parent by JSON lines in a pipe.

The kernel kills it when its parent ends. SIGINT and SIGTERM have their default effect here, so the kernel
ends the guest whatever it does, without help from wasmtime.
"""

import _thread
import hashlib
import io
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from ipfsfuse.confinement import Access
from ipfsfuse.errors import IpfsFuseError, UsageError
from ipfsfuse_run import growth, host_folders, lockdown, processes, sandbox
from ipfsfuse_run.code_cache import Code, CodeCache, Key, binary
from ipfsfuse_run.errors import COULD_NOT_RUN, GuestRefused
from ipfsfuse_run.growth import Growth, Watched
from ipfsfuse_run.options import Options
from ipfsfuse_run.sandbox import IPFS, OpenFolder, Sandbox

if TYPE_CHECKING:  # wasmtime takes 40 ms to import
    from ipfsfuse_run.guest import End

MAX_GUEST = 256 << 20
"""Bytes of the largest guest."""
_STACK_SPARE = 4 << 20
_MAX_TRAP = 64 << 10
"""Characters of a back-trace that are reported. The module chose the function names in it, so it may be
long."""


class Plan(NamedTuple):
    """What to run, and how."""

    options: Options
    mountpoint: str
    box: Sandbox
    mount_id: int | None = None
    """The kernel's number that the mount at `mountpoint` must have; None if any folder will do."""
    command: str | None = None
    """The wasmtime command that runs the guest; None for the library."""
    guest_copy: int | None = None
    """The descriptor of a file that gets a copy of the guest's bytes."""
    shown_as: str | None = None
    """The guest's name in messages, if it is not `options.guest`."""
    max_data: int | None = None
    """Bytes of memory that the guest's process may write to, wasmtime's own included."""
    guest_sha256: str | None = None
    """The SHA-256 that the guest's binary form must have."""

    @property
    def name(self) -> str:
        return self.shown_as or self.options.guest_name


class Reports:
    """The child's end of the pipe to its parent."""

    def __init__(self, file: int) -> None:
        self.file = file

    def send(self, message: Mapping[str, object]) -> None:
        os.write(self.file, json.dumps(message).encode() + b"\n")


def main(plan: Plan, parent: int, reports: Reports) -> NoReturn:
    """Exits with the guest's code, 134 if it trapped, 125 if it can't run, 2 for a usage error."""
    code = COULD_NOT_RUN
    try:
        # the guest's process needs none of the other files that the runner and its caller opened
        processes.close_all_but(0, 1, 2, plan.guest_copy, reports.file, _named_descriptor(plan.options.guest))
        processes.handle_signals(signal.SIG_DFL)
        processes.die_with(parent)
        code = _run(plan, reports)
    except IpfsFuseError as exc:
        code = 2 if isinstance(exc, UsageError) else COULD_NOT_RUN
        reports.send({"refused": str(exc)})
    except MemoryError:
        reports.send({"refused": f"{plan.name} can't be run: the system gives this process no more memory"})
    except Exception as exc:  # without this, the guest would seem to have exited with 1
        reports.send({"refused": f"{plan.name} met a fault of the runner's: {exc!r}"})
    finally:
        sys.stderr.flush()
        os._exit(code)  # at once: wasmtime's threads may still wait in a read


def _named_descriptor(guest: str) -> int | None:
    """N if the guest is /dev/fd/N."""
    folder, name = os.path.split(guest)
    return int(name) if folder in ("/proc/self/fd", "/dev/fd") and name.isdigit() else None


def _run(plan: Plan, reports: Reports) -> int:
    data = None
    if plan.command is not None:
        from ipfsfuse_run import command

        with _open_guest(plan) as file:
            data = _read_guest(plan, file)
        try:
            return _run_command(plan, plan.command, data, reports)
        except command.TooOld as exc:
            if plan.options.engine == "command":
                raise GuestRefused(
                    f"{plan.command} is older than version {command.MIN_VERSION}: give --engine library"
                ) from exc
    return _run_library(plan, data, reports)


def _run_command(plan: Plan, path: str, data: bytes, reports: Reports) -> int:
    """Executes the wasmtime command in this process. Returns 0 if the guest is only compiled. Raises TooOld,
    GuestRefused."""
    from ipfsfuse_run import command

    given = plan.options.limits
    key, build = command.key(path, given), partial(command.build, path, given)
    code = _compiled(plan, key, build, reports, data, lambda: command.check_version(path))
    if plan.options.compile_only:
        return 0
    with sandbox.open_folders(plan.box) as folders:
        grown = _writable(plan, folders, reports)
        _limit_process(plan, grown)
        _lock(plan, folders, command.allowed(path, code.file), f"the command {path}", reports)
        reports.send({"started": True, "command": True})
        return command.execute(path, plan.box, given, folders, code.file)


def _run_library(plan: Plan, data: bytes | None, reports: Reports) -> int:
    from ipfsfuse_run import guest

    given = plan.options.limits
    settings = guest.Settings(given.fuel is not None, given.max_wasm_stack, plan.options.deterministic)
    with sandbox.open_folders(plan.box) as folders:
        engine = guest.make_engine(settings)
        key, build = guest.key(settings), partial(guest.build, engine)
        preloaded = {
            name: _compiled(plan._replace(options=plan.options._replace(guest=place)), key, build, reports)
            for name, place in plan.options.preload
        }
        code = _compiled(plan, key, build, reports, data)
        if plan.options.compile_only:
            return 0
        call = None if plan.options.invoke is None else guest.Call(plan.options.invoke, plan.box.argv[1:])
        codes = [code, *preloaded.values()]
        guest.import_for([each.kind for each in codes], call)
        grown = _writable(plan, folders, reports)
        wasi = guest.wasi_config(plan.box, folders)
        _limit_process(plan, grown)
        _lock(plan, folders, [Access(each.file) for each in codes], "the library", reports)
    preloads = {name: guest.load(engine, each) for name, each in preloaded.items()}
    ready = guest.load(engine, code)
    end = _in_thread(
        given.max_wasm_stack,
        lambda: guest.run(
            ready,
            wasi,
            given,
            plan.options.deterministic,
            lambda: reports.send({"started": True}),
            call,
            preloads,
        ),
    )
    sys.stdout.write("".join(f"{each}\n" for each in end.results))
    sys.stdout.flush()
    reports.send(
        {"ended": end.code, "trapped": end.trap is not None, "trap": end.trap and end.trap[:_MAX_TRAP]}
    )
    return end.code


def _lock(
    plan: Plan, folders: Sequence[OpenFolder], more: Sequence[Access], engine: str, reports: Reports
) -> None:
    """From here on the kernel refuses everything that a guest does not need. On a mount of ours, landlock
    allows writing, so that the guest gets the mount's EPERM. Raises GuestRefused with --require-sandbox."""
    allowed = [Access(each.file, each.writable or each.in_mount) for each in folders]
    active = lockdown.lock([*allowed, *more])
    missing = [each for each in lockdown.LAYERS if each not in active]
    if plan.options.verbose:
        without = f", without {', '.join(missing)}" if missing else ""
        locked = f"locked by {', '.join(active)}{without}"
        reports.send(
            {"says": f"{plan.name} runs in {engine}, {locked}; every call of wasi:sockets is refused"}
        )
    if missing and plan.options.require_sandbox:
        raise GuestRefused(f"--require-sandbox: this machine lacks {', '.join(missing)}")


def _in_thread(max_wasm_stack: int | None, run: Callable[[], "End"]) -> "End":
    """Runs the guest in a thread with a stack that is deep enough, and raises what it raises. Uses `_thread`,
    because `threading` takes 2 ms to import."""
    result: list[End | BaseException] = []
    ended = _thread.allocate_lock()
    ended.acquire()

    def work() -> None:
        try:
            result.append(run())
        except BaseException as exc:
            result.append(exc)
        finally:
            ended.release()

    size = max(8 << 20, (max_wasm_stack or 0) + _STACK_SPARE)
    try:
        _thread.stack_size(size)
        _thread.start_new_thread(work, ())
    except RuntimeError as exc:
        raise GuestRefused(
            f"the system refuses a thread with a stack of {size} bytes: give a smaller -W max-wasm-stack"
        ) from exc
    ended.acquire()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _writable(plan: Plan, folders: list[OpenFolder], reports: Reports) -> Growth:
    """The folders that the guest may write to, with their size before the run. Adds its /tmp to `folders`."""
    box, found = plan.box, []
    given = [each.host for each in box.preopens if each.writable]
    if given:
        try:
            found.append(Watched("max_out", given, growth.measure(given), plan.options.limits.out_bytes))
        except growth.TooDeep as exc:
            raise GuestRefused(
                "a writable folder holds others nested so deeply that they can't be measured: give it as "
                "read-only"
            ) from exc
    if box.tmp:
        tmp = host_folders.make_tmp(box.tmp, reports.file)
        names = [sandbox.TMP, "."] if sandbox.is_tmp(box.cwd) else [sandbox.TMP]
        folders += [OpenFolder(sandbox.TMP, tmp.file, each, writable=True) for each in names]
        if tmp.folder is not None:
            found.append(Watched(growth.TMP, [tmp.folder], growth.Usage(0, 0), box.tmp))
    reports.send({"growth": found})  # before the guest's code is loaded, because that could send another size
    return found


def _limit_process(plan: Plan, grown: Growth) -> None:
    """Sets the limits that wasmtime can't set. This process runs nothing but the guest."""
    processes.limit(resource.RLIMIT_CORE, 0)
    if plan.options.limits.max_open_files is not None:
        processes.limit(resource.RLIMIT_NOFILE, plan.options.limits.max_open_files)
    if plan.max_data is not None:
        processes.limit(resource.RLIMIT_DATA, plan.max_data)
    if grown:  # a write beyond the limit then kills by SIGXFSZ, which Python ignores by default
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        processes.limit(resource.RLIMIT_FSIZE, grown[0].file_limit)


def _compiled(
    plan: Plan,
    key: Key,
    build: Callable[[str, bytes, str], bytes],
    reports: Reports,
    data: bytes | None = None,
    check: Callable[[], None] = lambda: None,
) -> Code:
    """The compiled guest, from the cache or compiled now. `data` is the guest's content if it was read
    already. `check` is called before `build`. Compilation forks, which is safe: this process has no thread
    yet."""
    cache = CodeCache.of_user()
    with _open_guest(plan) if data is None else io.BytesIO(data) as file:
        if plan.guest_copy is None and plan.guest_sha256 is None:
            kept = cache.kept(file, plan.name, key)
            if kept is not None:
                return kept
        data = _read_guest(plan, file)
    check()
    reports.send({"compiling": True})
    memory = plan.options.limits.compile_bytes
    kind, code = binary(data, plan.name, memory)
    if plan.guest_sha256 not in (None, hashlib.sha256(code).hexdigest()):
        raise GuestRefused(f"{plan.name} is not the guest that was recorded")
    if plan.guest_copy is not None:
        with open(plan.guest_copy, "wb", closefd=False) as out:
            out.write(code)
    made = cache.compiled(kind, code, plan.name, memory, key, lambda: build(kind, code, plan.name))
    reports.send({"compiling": False})
    return made


@contextmanager
def _open_guest(plan: Plan) -> Iterator[io.BufferedIOBase]:
    """The guest's file. Raises GuestRefused, also where the `with` block raises OSError."""
    named = plan.options.guest
    try:
        if named == "-":
            yield io.BytesIO(sys.stdin.buffer.read(MAX_GUEST + 1))
        elif named.startswith(IPFS + "/"):
            place = sandbox.open_beneath(
                plan.mountpoint, named[len(IPFS) + 1 :], named, mount_id=plan.mount_id
            )
            with place as found, open(f"/proc/self/fd/{found}", "rb") as file:
                yield file
        else:
            with open(named, "rb") as file:
                yield file
    except OSError as exc:
        raise GuestRefused(f"{plan.name} can't be read: {exc.strerror}") from exc


def _read_guest(plan: Plan, file: io.BufferedIOBase) -> bytes:
    data = file.read(MAX_GUEST + 1)
    if len(data) > MAX_GUEST:
        raise GuestRefused(f"{plan.name} has more than {MAX_GUEST} bytes: no larger guest is run")
    return data
