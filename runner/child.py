"""The guest's own process: from the fork to its end. Tells its parent how it goes, as JSON lines in a pipe.

It ends with its parent, whatever happens to that one. SIGINT and SIGTERM have their default effect here, so that the
kernel ends the guest in whatever it is doing; wasmtime needs no part in it.
"""

import ctypes
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple, NoReturn

from ipfsfuse.errors import IpfsFuseError, UsageError
from runner import guest, sandbox, signals
from runner.codecache import CodeCache
from runner.errors import GuestRefused
from runner.sandbox import IPFS, Sandbox

PR_SET_PDEATHSIG = 1
_STACK_SPARE = 4 << 20


class Plan(NamedTuple):
    """What to run, and how."""

    guest: str
    """As it was named: a file, /ipfs/..., or `-`."""
    mountpoint: str
    box: Sandbox
    deterministic: bool = False
    keep: int | None = None
    """The descriptor of a file that gets a copy of the guest's bytes."""
    shown_as: str | None = None
    """The guest's name in messages, where it is not `guest`."""

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
    """Never returns: ends the process, by the guest's exit code, 134 where it trapped, 1 where it can't run, 2 for usage."""
    code = 1
    try:
        _die_with(parent)
        code = _in_thread(plan, reports)
    except IpfsFuseError as exc:
        code = 2 if isinstance(exc, UsageError) else 1
        reports.tell({"refused": str(exc)})
    except Exception as exc:  # else it would look like a guest that ended with 1
        reports.tell({"refused": f"{plan.name} met a fault of the runner's: {exc!r}"})
    finally:
        sys.stderr.flush()
        os._exit(code)  # wasmtime's own threads may still wait in a read: nothing is left to tidy up


def _die_with(parent: int) -> None:
    for each in signals.ENDING:
        if signal.getsignal(each) != signal.SIG_IGN:  # nohup
            signal.signal(each, signal.SIG_DFL)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def _in_thread(plan: Plan, reports: Reports) -> int:
    """Runs the guest in a thread whose stack is as deep as it may need; whatever it raises is raised here."""
    result: list[int | BaseException] = []

    def work() -> None:
        try:
            result.append(_run(plan, reports))
        except BaseException as exc:
            result.append(exc)

    threading.stack_size(max(8 << 20, (plan.box.limits.max_wasm_stack or 0) + _STACK_SPARE))
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _run(plan: Plan, reports: Reports) -> int:
    wasi = sandbox.wasi_config(plan.box)
    name, limits = plan.name, plan.box.limits
    ready = _ready(plan, guest.Settings(limits.fuel is not None, limits.max_wasm_stack, plan.deterministic))
    sandbox.limit_process(limits)
    begun = {"started": True, "kind": ready.kind}
    end = guest.run(ready, wasi, limits, plan.deterministic, lambda: reports.tell(begun))
    if end.trap is not None:
        print(f"ipfsfuse-run: {name} trapped: {end.trap.strip()}", file=sys.stderr)
    reports.tell({"ended": end.code, "trapped": end.trap is not None})
    return end.code


def _ready(plan: Plan, settings: guest.Settings) -> guest.Guest:
    """The guest, compiled now or before."""
    cache = CodeCache.of_user()
    with _opened(plan) as file:
        try:
            kept = cache.kept(file, plan.name, settings) if plan.keep is None else None
            if kept is not None:
                return kept
            kind, code = guest.binary(file.read(), plan.name)
        except OSError as exc:
            raise _unreadable(plan, exc) from exc
    if plan.keep is not None:
        with open(plan.keep, "wb", closefd=False) as out:
            out.write(code)
    return cache.load(kind, code, plan.name, settings)


def _opened(plan: Plan) -> io.BufferedReader | io.BytesIO:
    if plan.guest == "-":
        return io.BytesIO(sys.stdin.buffer.read())
    named, in_mount = plan.guest, plan.guest.startswith(IPFS + "/")
    place = sandbox.inside(plan.mountpoint, named[len(IPFS) + 1 :], named) if in_mount else nullcontext(named)
    try:
        with place as path:
            return open(path, "rb")
    except OSError as exc:
        raise _unreadable(plan, exc) from exc


def _unreadable(plan: Plan, why: OSError) -> GuestRefused:
    return GuestRefused(f"{plan.name} can't be read: {why.strerror}")
