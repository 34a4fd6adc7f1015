"""The clock and the random numbers of --deterministic, for guests in the wasmtime library."""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import wasmtime

from ipfsfuse_run.errors import GuestRefused

if TYPE_CHECKING:  # takes 13 ms to import, and core modules don't need it
    from wasmtime import component

START_NS = 946_684_800_000_000_000
"""2000-01-01T00:00:00Z, in nanoseconds since 1970."""
STEP_NS = 1_000_000
MAX_RANDOM = 64 << 20
"""Bytes of random numbers that wasmtime gives in one call."""

_WALL_CLOCK = 0
_OK, _FAULT = 0, 21
"""WASI preview 1's errno."""
_VERSIONS = range(100)


class DeterministicHost:
    """A clock that advances by STEP_NS with each reading, and the same random numbers in each run."""

    def __init__(self) -> None:
        self._reads = 0
        self._draws = 0

    def monotonic(self) -> int:
        """Nanoseconds, from 0."""
        self._reads += 1
        return self._reads * STEP_NS

    def wall(self) -> int:
        """Nanoseconds since 1970."""
        return START_NS + self.monotonic()

    def random(self, length: int) -> bytes:
        """Raises Trap for more than MAX_RANDOM bytes, as wasmtime itself does."""
        if length > MAX_RANDOM:
            raise wasmtime.Trap(f"requested len {length} exceeds limit {MAX_RANDOM}")
        self._draws += 1
        return hashlib.shake_256(b"ipfsfuse-run %d" % self._draws).digest(length)

    def random_u64(self) -> int:
        return int.from_bytes(self.random(8), "little")


# -- preview 1 ---------------------------------------------------------------------------------------------


WASI_P1 = ("wasi_snapshot_preview1", "wasi_unstable")


def make_module_deterministic(linker: wasmtime.Linker) -> None:
    """Replaces the clock and random functions of preview 1, in a linker that allows shadowing."""
    host = DeterministicHost()

    def clock_time_get(caller: wasmtime.Caller, clock: int, _precision: int, at: int) -> int:
        now = host.wall() if clock == _WALL_CLOCK else host.monotonic()
        return _put(caller, at, 8, lambda: now.to_bytes(8, "little"))

    def clock_res_get(caller: wasmtime.Caller, _clock: int, at: int) -> int:
        return _put(caller, at, 8, lambda: STEP_NS.to_bytes(8, "little"))

    def random_get(caller: wasmtime.Caller, at: int, length: int) -> int:
        return _put(caller, at, length & 0xFFFF_FFFF, lambda: host.random(length & 0xFFFF_FFFF))

    i32, i64 = wasmtime.ValType.i32, wasmtime.ValType.i64
    functions: dict[str, tuple[list[wasmtime.ValType], Callable[..., int]]] = {
        "clock_time_get": ([i32(), i64(), i32()], clock_time_get),
        "clock_res_get": ([i32(), i32()], clock_res_get),
        "random_get": ([i32(), i32()], random_get),
    }
    for module in WASI_P1:
        for name, (params, function) in functions.items():
            kind = wasmtime.FuncType(params, [i32()])
            linker.define_func(module, name, kind, function, access_caller=True)


def _put(caller: wasmtime.Caller, at: int, length: int, make: Callable[[], bytes]) -> int:
    """Writes `length` bytes at `at`. Calls `make` only if they fit into the guest's memory."""
    memory = caller.get("memory")
    start = at & 0xFFFF_FFFF  # wasmtime passes an i32 as a signed number
    if not isinstance(memory, wasmtime.Memory) or start + length > memory.data_len(caller):
        return _FAULT
    memory.write(caller, make(), start)
    return _OK


# -- preview 2 ---------------------------------------------------------------------------------------------


def make_component_deterministic(linker: "component.Linker") -> None:
    """Replaces the clock and random functions of preview 2, in a linker that allows shadowing.

    Raises GuestRefused if this wasmtime's names for them are not found: a run that only seems to be
    deterministic is worse than none."""
    host = DeterministicHost()
    version = _host_version(linker.engine)
    with linker.root() as root:
        for interface, functions in _replacements(host).items():
            with root.add_instance(f"{interface}@{version}") as instance:
                for name, function in functions.items():
                    instance.add_func(name, function)


def _replacements(host: DeterministicHost) -> dict[str, dict[str, Callable[..., Any]]]:
    from wasmtime import component

    def datetime(nanoseconds: int) -> component.Record:
        record = component.Record()
        seconds, rest = divmod(nanoseconds, 1_000_000_000)
        vars(record).update(seconds=seconds, nanoseconds=rest)
        return record

    return {
        "wasi:clocks/monotonic-clock": {"now": lambda _s: host.monotonic(), "resolution": lambda _s: STEP_NS},
        "wasi:clocks/wall-clock": {
            "now": lambda _s: datetime(host.wall()),
            "resolution": lambda _s: datetime(STEP_NS),
        },
        "wasi:random/random": {
            "get-random-bytes": lambda _s, n: host.random(n),
            "get-random-u64": lambda _s: host.random_u64(),
        },
        "wasi:random/insecure": {
            "get-insecure-random-bytes": lambda _s, n: host.random(n),
            "get-insecure-random-u64": lambda _s: host.random_u64(),
        },
        "wasi:random/insecure-seed": {"insecure-seed": lambda _s: (host.random_u64(), host.random_u64())},
    }


def _host_version(engine: wasmtime.Engine) -> str:
    """The 0.2.x in the names of wasmtime's own definitions. Our functions replace single functions of an
    interface only if its name is the same.

    A linker without shadowing refuses to define an existing function again: that tells the version."""
    from wasmtime import component

    for minor in _VERSIONS:
        linker = component.Linker(engine)
        linker.add_wasip2()
        with linker.root() as root, root.add_instance(f"wasi:clocks/monotonic-clock@0.2.{minor}") as instance:
            try:
                instance.add_func("now", lambda _s: 0)
            except wasmtime.WasmtimeError:
                return f"0.2.{minor}"
    raise GuestRefused(
        "--deterministic knows no way to replace this wasmtime's clock: use the version that the "
        "receipt names"
    )
