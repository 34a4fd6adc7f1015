"""The guest's own process, from the fork to its end. It reports to its parent by JSON lines in a pipe.

The kernel ends it with its parent. SIGINT and SIGTERM have their default effect here, so the kernel ends the
guest whatever it does, without help from wasmtime.
"""

import _thread
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from ipfsfuse.errors import IpfsFuseError, UsageError
from ipfsfuse_run import growth, limits, lockdown, places, sandbox, signals
from ipfsfuse_run.errors import COULD_NOT_RUN, GuestRefused
from ipfsfuse_run.growth import Growth, Watched
from ipfsfuse_run.lockdown import Access
from ipfsfuse_run.sandbox import IPFS, OpenFolder, Sandbox

if TYPE_CHECKING:  # wasmtime takes 40 ms to import
    import wasmtime

    from ipfsfuse_run.guest import Code, End, Settings

MAX_GUEST = 256 << 20
"""Bytes of the largest guest."""
_STACK_SPARE = 4 << 20
_MAX_TRAP = 64 << 10
"""Characters of a back-trace that are passed on: the module chose the function names in it."""


class Plan(NamedTuple):
    """What to run, and how."""

    guest: str
    """As it was named: a file, /ipfs/..., or `-`."""
    mountpoint: str
    box: Sandbox
    mount_id: int | None = None
    """The kernel's number of the mount at `mountpoint`, where it must be that one."""
    deterministic: bool = False
    keep: int | None = None
    """The descriptor of a file that gets a copy of the guest's bytes."""
    shown_as: str | None = None
    """The guest's name in messages, where it is not `guest`."""
    compile_only: bool = False
    verbose: bool = False
    require_sandbox: bool = False
    engine: str = "auto"
    command: str | None = None
    """The wasmtime command that runs the guest; None for the library."""
    invoke: str | None = None
    """The function to call in place of `_start`, with the arguments of `box`."""
    preload: Sequence[tuple[str, str]] = ()
    """Modules that the guest imports from: (name, place)."""
    max_data: int | None = None
    """Bytes of memory that the guest's process may write to, its own needs included."""
    guest_sha256: str | None = None
    """Of the guest's binary form, where it must be that very one."""

    @property
    def name(self) -> str:
        return self.shown_as or ("standard input" if self.guest == "-" else self.guest)


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
        _close_others(plan, reports)
        signals.restore_defaults()
        signals.die_with(parent)
        code = _run(plan, reports)
    except IpfsFuseError as exc:
        code = 2 if isinstance(exc, UsageError) else COULD_NOT_RUN
        reports.send({"refused": str(exc)})
    except MemoryError:
        reports.send({"refused": f"{plan.name} can't be run: the system gives this process no more memory"})
    except Exception as exc:  # else it would look like a guest that ended with 1
        reports.send({"refused": f"{plan.name} met a fault of the runner's: {exc!r}"})
    finally:
        sys.stderr.flush()
        os._exit(code)  # at once: wasmtime's threads may still wait in a read


def _close_others(plan: Plan, reports: Reports) -> None:
    """Closes what the runner and its caller had open: the guest's process needs none of it."""
    kept = {0, 1, 2, plan.keep, reports.file}
    named = os.path.split(plan.guest)
    if named[0] in ("/proc/self/fd", "/dev/fd") and named[1].isdigit():
        kept.add(int(named[1]))
    for each in map(int, os.listdir("/proc/self/fd")):
        try:
            if each not in kept:
                os.close(each)
        except OSError:
            pass  # the listing's own


def _run(plan: Plan, reports: Reports) -> int:
    data = None
    if plan.command is not None:
        from ipfsfuse_run import command

        with _opened(plan) as file:
            try:
                data = file.read(MAX_GUEST + 1)
            except OSError as exc:
                raise _unreadable(plan, exc) from exc
        _check_size(plan, data)
        try:
            return _run_command(plan, plan.command, data, reports)
        except command.TooOld as exc:
            if plan.engine == "command":
                raise GuestRefused(
                    f"{plan.command} is older than version {command.MIN_VERSION}: give --engine library"
                ) from exc
    return _run_library(plan, data, reports)


def _run_command(plan: Plan, path: str, data: bytes, reports: Reports) -> int:  # noqa: RET503
    """Becomes the wasmtime command, or gives 0 if the guest is only compiled. Raises TooOld, GuestRefused."""
    from ipfsfuse_run import command

    given = plan.box.limits
    reports.send({"compiling": True})
    ready = command.ready(path, data, given, plan.name)
    reports.send({"compiling": False})
    if plan.compile_only:
        return 0
    with sandbox.opened_folders(plan.box) as folders:
        grown = _writable(plan.box, folders, reports)
        sandbox.limit_process(given, grown[0].file_limit if grown else None, plan.max_data)
        _lock(plan, folders, command.allowed(path, ready.file), f"the command {path}", reports)
        reports.send({"started": True, "kind": ready.kind, "command": True})
        command.execute(path, plan.box, folders, ready.file)


def _run_library(plan: Plan, data: bytes | None, reports: Reports) -> int:
    from ipfsfuse_run import guest

    given = plan.box.limits
    settings = guest.Settings(given.fuel is not None, given.max_wasm_stack, plan.deterministic)
    with sandbox.opened_folders(plan.box) as folders:
        engine = guest.make_engine(settings)
        preloaded = {
            name: _compiled(
                plan._replace(guest=place, keep=None, shown_as=None), engine, settings, None, reports
            )
            for name, place in plan.preload
        }
        code = _compiled(plan, engine, settings, data, reports)
        if plan.compile_only:
            return 0
        for each in (code, *preloaded.values()):
            guest.form_of(each.kind)  # imports what is needed, as long as this process can
        grown = _writable(plan.box, folders, reports)
        wasi = guest.wasi_config(plan.box, folders)
        sandbox.limit_process(given, grown[0].file_limit if grown else None, plan.max_data)
        _lock(
            plan,
            folders,
            [Access(each.file) for each in (code, *preloaded.values())],
            "the library",
            reports,
        )
    preloads = {name: guest.load(engine, each) for name, each in preloaded.items()}
    ready = guest.load(engine, code)
    call = None if plan.invoke is None else guest.Call(plan.invoke, plan.box.argv[1:])
    begun = {"started": True, "kind": ready.kind}
    end = _in_thread(
        given.max_wasm_stack,
        lambda: guest.run(
            ready, wasi, given, plan.deterministic, lambda: reports.send(begun), call, preloads
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
    """From here on the kernel refuses this process what a guest does not need. On a mount of ours, landlock
    allows writing, so that the mount's EPERM answers. Raises GuestRefused with --require-sandbox."""
    allowed = [Access(each.file, each.writable or each.in_mount) for each in folders]
    active = lockdown.lock([*allowed, *more])
    missing = [each for each in lockdown.LAYERS if each not in active]
    if plan.verbose:
        without = f", without {', '.join(missing)}" if missing else ""
        locked = f"locked by {', '.join(active)}{without}"
        reports.send(
            {"says": f"{plan.name} runs in {engine}, {locked}; every call of wasi:sockets is refused"}
        )
    if missing and plan.require_sandbox:
        raise GuestRefused(f"--require-sandbox: this machine lacks {', '.join(missing)}")


def _in_thread(max_wasm_stack: int | None, run: Callable[[], "End"]) -> "End":
    """Runs the guest in a thread whose stack is deep enough, and raises what it raised. By `_thread`, because
    `threading` takes 2 ms to import."""
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


def _writable(box: Sandbox, folders: list[OpenFolder], reports: Reports) -> Growth:
    """What the guest may write to and must be watched, as it is now. Adds its /tmp to `folders`."""
    found = []
    given = [each.host for each in box.preopens if each.writable]
    if given:
        bound = limits.MAX_OUT if box.limits.max_out is None else box.limits.max_out
        try:
            found.append(Watched("max_out", given, growth.measure(given), bound))
        except growth.TooDeep as exc:
            raise GuestRefused(
                "a writable folder holds others nested so deeply that they can't be measured: give it as "
                "read-only"
            ) from exc
    if box.tmp:
        tmp = places.make_tmp(box.tmp, reports.file)
        names = [sandbox.TMP, "."] if sandbox.is_tmp(box.cwd) else [sandbox.TMP]
        folders += [OpenFolder(sandbox.TMP, tmp.file, each, writable=True) for each in names]
        if tmp.folder is not None:
            found.append(Watched(growth.TMP, [tmp.folder], growth.Usage(0, 0), box.tmp))
    reports.send({"growth": found})  # before the guest's code is loaded, which could tell otherwise
    return found


def _compiled(
    plan: Plan, engine: "wasmtime.Engine", settings: "Settings", known: bytes | None, reports: Reports
) -> "Code":
    """The guest, compiled before or now. Compilation forks, which is safe: this process has no thread yet."""
    from ipfsfuse_run import guest
    from ipfsfuse_run.code_cache import CodeCache

    cache = CodeCache.of_user()
    with _opened(plan) if known is None else io.BytesIO(known) as file:
        try:
            checked = plan.keep is not None or plan.guest_sha256 is not None
            kept = None if checked else guest.kept(cache, file, plan.name, settings)
            if kept is not None:
                return kept
            data = file.read(MAX_GUEST + 1)
        except OSError as exc:
            raise _unreadable(plan, exc) from exc
    _check_size(plan, data)
    reports.send({"compiling": True})
    memory = limits.compile_memory(plan.box.limits)
    kind, code = guest.binary(data, plan.name, memory)
    if plan.guest_sha256 not in (None, hashlib.sha256(code).hexdigest()):
        raise GuestRefused(f"{plan.name} is not the guest that was recorded")
    if plan.keep is not None:
        with open(plan.keep, "wb", closefd=False) as out:
            out.write(code)
    made = guest.compiled(cache, engine, kind, code, plan.name, settings, memory)
    reports.send({"compiling": False})
    return made


def _check_size(plan: Plan, data: bytes) -> None:
    if len(data) > MAX_GUEST:
        raise GuestRefused(f"{plan.name} has more than {MAX_GUEST} bytes: no larger guest is run")


def _opened(plan: Plan) -> io.BufferedReader | io.BytesIO:
    if plan.guest == "-":
        return io.BytesIO(sys.stdin.buffer.read(MAX_GUEST + 1))
    named, in_mount = plan.guest, plan.guest.startswith(IPFS + "/")
    place = (
        sandbox.inside(plan.mountpoint, named[len(IPFS) + 1 :], named, mount_id=plan.mount_id)
        if in_mount
        else nullcontext(named)
    )
    try:
        with place as path:
            return open(path, "rb")
    except OSError as exc:
        raise _unreadable(plan, exc) from exc


def _unreadable(plan: Plan, why: OSError) -> GuestRefused:
    return GuestRefused(f"{plan.name} can't be read: {why.strerror}")
