"""Clock and random that are the same in every run, in place of the host's: what --deterministic changes.

Both are functions of the calls before: the clock starts at a fixed time and moves on by a millisecond each time it is
read (a guest that waits for a time to pass would spin for ever on one that stands still), random is SHAKE-256 of a
counter. One guest a process: the state lives in the closures that are made here.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence

import wasmtime
from wasmtime import component

START_NS = 946_684_800_000_000_000
"""2000-01-01T00:00:00Z, in nanoseconds since 1970."""
STEP_NS = 1_000_000

_OK, _FAULT = 0, 21
"""WASI preview 1's errno."""


def _make_clock() -> Callable[[], int]:
    ticks = itertools.count(START_NS, STEP_NS)
    return lambda: next(ticks)


def _make_random() -> Callable[[int], bytes]:
    calls = itertools.count()

    def random(length: int) -> bytes:
        return hashlib.shake_256(b"ipfsfuse-run %d" % next(calls)).digest(length)

    return random


def fix_module(linker: wasmtime.Linker, modules: Sequence[str]) -> None:
    """Replaces the clock and random functions of preview 1, in a linker that allows shadowing."""
    clock, random = _make_clock(), _make_random()

    def put(caller: wasmtime.Caller, data: bytes, at: int) -> int:
        memory = caller.get("memory")
        if not isinstance(memory, wasmtime.Memory):
            return _FAULT
        at &= 0xFFFF_FFFF
        if at + len(data) > memory.data_len(caller):
            return _FAULT
        memory.write(caller, data, at)
        return _OK

    def clock_time_get(caller: wasmtime.Caller, _clock: int, _precision: int, at: int) -> int:
        return put(caller, clock().to_bytes(8, "little"), at)

    def clock_res_get(caller: wasmtime.Caller, _clock: int, at: int) -> int:
        return put(caller, STEP_NS.to_bytes(8, "little"), at)

    def random_get(caller: wasmtime.Caller, at: int, length: int) -> int:
        length &= 0xFFFF_FFFF
        memory = caller.get("memory")
        if not isinstance(memory, wasmtime.Memory) or length > memory.data_len(caller):
            return _FAULT
        return put(caller, random(length), at)

    i32, i64 = wasmtime.ValType.i32, wasmtime.ValType.i64
    for name in modules:
        linker.define_func(name, "clock_time_get", wasmtime.FuncType([i32(), i64(), i32()], [i32()]), clock_time_get, access_caller=True)
        linker.define_func(name, "clock_res_get", wasmtime.FuncType([i32(), i32()], [i32()]), clock_res_get, access_caller=True)
        linker.define_func(name, "random_get", wasmtime.FuncType([i32(), i32()], [i32()]), random_get, access_caller=True)


def fix_component(linker: component.Linker) -> None:
    """Replaces the clock and random functions of preview 2, in a linker that allows shadowing."""
