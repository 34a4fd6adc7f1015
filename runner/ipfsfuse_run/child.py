"""The guest's own process: from the fork to its end. It tells its parent how it goes, as JSON lines in a
pipe.

It ends with its parent, whatever happens to that one. SIGINT and SIGTERM have their default effect here, so
that the kernel ends the guest in whatever it is doing; wasmtime needs no part in it.
"""

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple, NoReturn

from ipfsfuse.errors import IpfsFuseError, UsageError
from ipfsfuse_run import growth, guest, limits, sandbox, signals
from ipfsfuse_run.codecache import CodeCache
from ipfsfuse_run.errors import COULD_NOT_RUN, GuestRefused
from ipfsfuse_run.growth import Growth
from ipfsfuse_run.guest import Guest
from ipfsfuse_run.sandbox import IPFS, Sandbox

_STACK_SPARE = 4 << 20
_MAX_TRAP = 64 << 10
"""Characters of a back-trace that are passed on: function names in it are as long as the module likes."""


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
    max_data: int | None = None
    """Bytes of memory that the guest's process may write to, its own needs included."""

    @property
    def name(self) -> str:
        return self.shown_as or ("standard input" if self.guest == "-" else self.guest)


class Reports:
    """The child's end of the pipe to its parent."""

    def __init__(self, file: int) -> None:
        self._file = file

    def tell(self, message: Mapping[str, object]) -> None:
        os.write(self._file, json.dumps(message).encode() + b"\n")


def main(plan: Plan, parent: int, reports: Reports) -> NoReturn:
    """Never returns: ends the process, by the guest's exit code, 134 where it trapped, 125 where it can't
    run, 2 for usage."""
    code = COULD_NOT_RUN
    try:
        signals.default()
        signals.die_with(parent)
        code = _run(plan, reports)
    except IpfsFuseError as exc:
        code = 2 if isinstance(exc, UsageError) else COULD_NOT_RUN
        reports.tell({"refused": str(exc)})
    except MemoryError:
        reports.tell({"refused": f"{plan.name} can't be run: the system gives this process no more memory"})
    except Exception as exc:  # else it would look like a guest that ended with 1
        reports.tell({"refused": f"{plan.name} met a fault of the runner's: {exc!r}"})
    finally:
        sys.stderr.flush()
        os._exit(code)  # wasmtime's own threads may still wait in a read: nothing is left to tidy up


def _run(plan: Plan, reports: Reports) -> int:
    wasi = sandbox.wasi_config(plan.box)
    given = plan.box.limits
    ready = _ready(
        plan, guest.Settings(given.fuel is not None, given.max_wasm_stack, plan.deterministic), reports
    )
    grown = _growth(plan.box)
    sandbox.limit_process(given, None if grown is None else grown.file_limit, plan.max_data)
    begun = {"started": True, "kind": ready.kind, "growth": grown}
    end = _in_thread(
        given.max_wasm_stack,
        lambda: guest.run(ready, wasi, given, plan.deterministic, lambda: reports.tell(begun)),
    )
    reports.tell(
        {"ended": end.code, "trapped": end.trap is not None, "trap": end.trap and end.trap[:_MAX_TRAP]}
    )
    return end.code


def _in_thread(max_wasm_stack: int | None, run: Callable[[], guest.End]) -> guest.End:
    """Runs the guest in a thread whose stack is as deep as it may need; whatever it raises is raised here."""
    result: list[guest.End | BaseException] = []

    def work() -> None:
        try:
            result.append(run())
        except BaseException as exc:
            result.append(exc)

    size = max(8 << 20, (max_wasm_stack or 0) + _STACK_SPARE)
    threading.stack_size(size)
    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
    except RuntimeError as exc:
        raise GuestRefused(
            f"the system refuses a thread with a stack of {size} bytes: give a smaller -W max-wasm-stack"
        ) from exc
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _growth(box: Sandbox) -> Growth | None:
    """What the guest may write to, as it is now."""
    folders = [each.host for each in box.preopens if each.writable]
    if not folders:
        return None
    bound = limits.MAX_OUT if box.limits.max_out is None else box.limits.max_out
    try:
        return Growth(folders, growth.measure(folders), bound)
    except growth.TooDeep as exc:
        raise GuestRefused(
            "a writable folder holds others nested so deeply that they can't be measured: give it as "
            "read-only"
        ) from exc


def _ready(plan: Plan, settings: guest.Settings, reports: Reports) -> Guest:
    """The guest, compiled before or now. Forks where it must be compiled: this process has no thread yet."""
    cache, engine = CodeCache.of_user(), guest.make_engine(settings)
    with _opened(plan) as file:
        try:
            kept = cache.kept(engine, file, plan.name, settings) if plan.keep is None else None
            if kept is not None:
                return kept
            data = file.read(guest.MAX_BYTES + 1)
        except OSError as exc:
            raise _unreadable(plan, exc) from exc
    if len(data) > guest.MAX_BYTES:
        raise GuestRefused(f"{plan.name} has more than {guest.MAX_BYTES} bytes: no larger guest is run")
    reports.tell({"compiling": True})
    kind, code = guest.binary(data, plan.name)
    if plan.keep is not None:
        with open(plan.keep, "wb", closefd=False) as out:
            out.write(code)
    ready = cache.load(engine, kind, code, plan.name, settings)
    reports.tell({"compiling": False})
    return ready


def _opened(plan: Plan) -> io.BufferedReader | io.BytesIO:
    if plan.guest == "-":
        return io.BytesIO(sys.stdin.buffer.read(guest.MAX_BYTES + 1))
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
