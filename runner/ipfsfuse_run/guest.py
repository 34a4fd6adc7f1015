"""One guest in the wasmtime library: compiles, links and calls it, and interprets how it ended. Also the
clock and random numbers of --deterministic.

Runs in the guest's process, on any one thread. Has no state of its own.
"""

import ctypes
import hashlib
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import wasmtime
from wasmtime import _ffi

from ipfsfuse_run import lockdown
from ipfsfuse_run.code_cache import MODULE, Code, Key, entry_key
from ipfsfuse_run.errors import TRAPPED, GuestRefused
from ipfsfuse_run.limits import STORE_LIMITS, Limits
from ipfsfuse_run.sandbox import OpenFolder, Sandbox

if TYPE_CHECKING:  # takes 13 ms to import, and core modules don't need it
    from wasmtime import component

_FIBER_SPARE = 2 << 20
_RUN = re.compile(r"wasi:cli/run@0\.2(\.\d+)?")
_PREVIEW_3 = re.compile(rb"wasi:[a-z-]+/[a-z-]+@0\.3[0-9a-z.-]*")


def wasi_config(box: Sandbox, folders: Sequence[OpenFolder]) -> wasmtime.WasiConfig:
    """The WASI configuration of the sandbox `box`; `folders` are its folders, opened. Raises GuestRefused."""
    wasi = wasmtime.WasiConfig()
    wasi.argv = list(box.argv)
    wasi.env = list(box.variables.items())
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    for each in folders:
        try:
            wasi.preopen_dir(each.path, each.guest, each.writable)
        except wasmtime.WasmtimeError as exc:
            raise GuestRefused(f"{each.name} can't be read by the guest") from exc
    return wasi


class End(NamedTuple):
    """How a guest ended: its exit code, and wasmtime's message with the back-trace if it trapped."""

    code: int
    trap: str | None = None
    results: Sequence[str] = ()
    """The results of the function that was called in place of `_start`."""


class Call(NamedTuple):
    """A function to call in place of `_start`."""

    name: str
    args: Sequence[str]


class _Exit(Exception):
    """Carries proc_exit's code out of the guest."""

    def __init__(self, code: int) -> None:
        self.code = code


class Settings(NamedTuple):
    """What compiled code depends on, besides the module and wasmtime's version."""

    fuel: bool
    max_wasm_stack: int | None
    deterministic: bool


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def make_engine(settings: Settings) -> wasmtime.Engine:
    """Raises GuestRefused."""
    config = wasmtime.Config()
    config.consume_fuel = settings.fuel
    if settings.max_wasm_stack is not None:
        config.max_wasm_stack = settings.max_wasm_stack
        # wasmtime aborts the process if its fibers' stacks (2 MiB) are smaller. Its Python package has no
        # function to set their size.
        _ffi.dll.wasmtime_config_async_stack_size_set(
            config.ptr(), ctypes.c_size_t(settings.max_wasm_stack + _FIBER_SPARE)
        )
    if settings.deterministic:
        config.cranelift_nan_canonicalization = True
        config.wasm_relaxed_simd_deterministic = True
    try:
        return wasmtime.Engine(config)
    except wasmtime.WasmtimeError as exc:
        raise GuestRefused(f"wasmtime refuses these limits: {one_line(exc)}") from exc


class Guest(NamedTuple):
    """Compiled and ready to start. `name` is for messages."""

    name: str
    engine: wasmtime.Engine
    compiled: "wasmtime.Module | component.Component"


def compile_guest(engine: wasmtime.Engine, kind: str, code: bytes, name: str) -> Guest:
    """Raises GuestRefused."""
    try:
        return Guest(name, engine, form_of(kind)(engine, code))
    except wasmtime.WasmtimeError as exc:
        wanted = _PREVIEW_3.search(code)
        if wanted is not None:
            raise GuestRefused(_preview_3(name, wanted[0].decode())) from exc
        raise GuestRefused(f"{name} is not a valid WebAssembly {kind}: {one_line(exc)}") from exc


def key(settings: Settings) -> Key:
    """How entries in the code cache are named."""
    library = os.stat(_ffi.dll._name)
    return lambda digest, kind: entry_key(digest, library, (kind, *map(str, settings)))


def build(engine: wasmtime.Engine, kind: str, code: bytes, name: str) -> bytes:
    """Compiles in the compiling process. Raises GuestRefused."""
    form_of(kind)  # imports what is needed, before the lock prevents it
    lockdown.lock([])
    return bytes(compile_guest(engine, kind, code, name).compiled.serialize())


def load(engine: wasmtime.Engine, code: Code) -> Guest:
    """Loads compiled code. Call it only in a locked process: a module that broke the compiler may have made
    this code. Raises GuestRefused."""
    path = f"/proc/self/fd/{code.file}"
    try:
        return Guest(code.name, engine, form_of(code.kind).deserialize_file(engine, path))
    except wasmtime.WasmtimeError as exc:
        raise GuestRefused(
            f"the compiled code of {code.name} is damaged ({one_line(exc)}): remove {os.readlink(path)}"
        ) from exc


def check(kind: str, code: bytes, name: str) -> None:
    """Refuses guests that the wasmtime command would refuse with an exit code that a guest could have, and
    guests that use interfaces which are not offered here. Compiles without optimization. Raises
    GuestRefused."""
    config = wasmtime.Config()
    config.cranelift_opt_level = "none"
    engine = wasmtime.Engine(config)
    ready = compile_guest(engine, kind, code, name)
    if isinstance(ready.compiled, wasmtime.Module):
        _check_start(name, ready.compiled)
        linker, store = wasmtime.Linker(engine), wasmtime.Store(engine)
        linker.define_wasi()
        for each in ready.compiled.imports:
            try:
                linker.get(store, each.module, each.name or "")
            except (KeyError, wasmtime.WasmtimeError) as exc:
                raise GuestRefused(
                    f"{name} can't be started: unknown import: `{each.module}::{each.name}`"
                ) from exc
        return
    _entry(ready, ready.compiled)
    for wanted in ready.compiled.type.imports(engine):
        if _PREVIEW_3.fullmatch(wanted.encode()):
            raise GuestRefused(_preview_3(name, wanted))
        if wanted.startswith("wasi:http/"):
            raise GuestRefused(f"{name} asks for {wanted}: wasi:http is not offered")


def _check_start(name: str, module: wasmtime.Module) -> None:
    types = [each.type for each in module.exports if each.name == "_start"]
    if not types:
        raise GuestRefused(f"{name} is a library, not a command: it exports no _start")
    if not isinstance(types[0], wasmtime.FuncType):
        raise GuestRefused(f"{name} is not a command: its _start is not a function")


def import_for(kinds: Iterable[str], call: Call | None) -> None:
    """Imports what is needed to run, before the lock prevents it."""
    for kind in kinds:
        form_of(kind)
    if call is not None:
        import decimal  # noqa: F401 # `_text` uses it


def form_of(kind: str) -> "type[wasmtime.Module | component.Component]":
    """The class that compiles and loads a guest of that kind."""
    if kind == MODULE:
        return wasmtime.Module
    from wasmtime import component

    return component.Component


def _preview_3(name: str, wanted: str) -> str:
    return f"{name} asks for {wanted}: WASI preview 3 is not offered, build it for preview 2"


def run(
    guest: Guest,
    wasi: wasmtime.WasiConfig,
    limits: Limits,
    deterministic: bool,
    begin: Callable[[], None],
    call: Call | None = None,
    preloads: Mapping[str, Guest] = MappingProxyType({}),
) -> End:
    """Runs the guest to its end. Calls `begin` right before the first instruction. Raises GuestRefused."""
    store = wasmtime.Store(guest.engine)
    store.set_wasi(wasi)  # before anything else: a store without it aborts the process
    _apply(limits, store)
    try:
        if isinstance(guest.compiled, wasmtime.Module):
            return _run_module(guest, guest.compiled, store, deterministic, begin, call, preloads)
        if call is not None or preloads:
            raise GuestRefused(f"{guest.name} is a component: --invoke and --preload take core modules")
        return End(_run_component(guest, guest.compiled, store, deterministic, begin))
    except (_Exit, wasmtime.ExitTrap) as exc:
        return End(exc.code & 0xFF or int(exc.code != 0))  # the lowest byte; a failure never becomes 0
    except wasmtime.Trap as exc:
        return End(TRAPPED, str(exc))
    except wasmtime.WasmtimeError as exc:
        text = str(exc)
        if "wasm trap" in text or "wasm backtrace" in text:
            return End(TRAPPED, text)
        raise GuestRefused(f"{guest.name} can't be started: {one_line(exc)}") from exc


def _apply(limits: Limits, store: wasmtime.Store) -> None:
    if limits.fuel is not None:
        store.set_fuel(limits.fuel)
    wanted = (getattr(limits, each) for each in STORE_LIMITS)
    store.set_limits(*(-1 if each is None else each for each in wanted))


def _run_module(
    guest: Guest,
    module: wasmtime.Module,
    store: wasmtime.Store,
    deterministic: bool,
    begin: Callable[[], None],
    call: Call | None,
    preloads: Mapping[str, Guest],
) -> End:
    values: list[int | float] = []
    if call is None:
        _check_start(guest.name, module)
    else:
        values = _arguments(guest.name, module, call)
    linker = wasmtime.Linker(guest.engine)
    linker.allow_shadowing = True
    linker.define_wasi()
    exits = wasmtime.FuncType([wasmtime.ValType.i32()], [])
    for wasi_name in WASI_P1:
        linker.define_func(wasi_name, "proc_exit", exits, _proc_exit)
    if deterministic:
        make_module_deterministic(linker)
    begin()
    for name, preloaded in preloads.items():
        if not isinstance(preloaded.compiled, wasmtime.Module):
            raise GuestRefused(f"--preload {name}: {preloaded.name} is a component, not a core module")
        linker.define_module(store, name, preloaded.compiled)
    exports = linker.instantiate(store, module).exports(store)
    initialize = exports.get("_initialize")  # a reactor has it (WASI's application ABI)
    if isinstance(initialize, wasmtime.Func) and call is not None and call.name != "_initialize":
        initialize(store)
    function = exports["_start" if call is None else call.name]
    assert isinstance(function, wasmtime.Func)  # checked
    given = function(store, *values)
    if call is None:
        return End(0)
    results = [] if given is None else given if isinstance(given, list) else [given]
    return End(0, results=[_text(*each) for each in zip(results, function.type(store).results, strict=True)])


def _arguments(name: str, module: wasmtime.Module, call: Call) -> list[int | float]:
    """The arguments of the call, converted to the function's types. Raises GuestRefused."""
    functions = {each.name: each.type for each in module.exports if isinstance(each.type, wasmtime.FuncType)}
    found = functions.get(call.name)
    if found is None:
        there = ", ".join(sorted(functions)[:10]) or "none"
        raise GuestRefused(f"{name} exports no function {call.name}; its functions: {there}")
    if len(found.params) != len(call.args):
        raise GuestRefused(f"{call.name} takes {len(found.params)} arguments, {len(call.args)} were given")
    return [_value(call.name, text, kind) for text, kind in zip(call.args, found.params, strict=True)]


def _value(name: str, text: str, kind: wasmtime.ValType) -> int | float:
    """Raises GuestRefused."""
    try:
        if str(kind) in _BITS:
            value, bits = int(text, 16 if "0x" in text.lower() else 10), _BITS[str(kind)]
            if -(1 << bits - 1) <= value < 1 << bits:
                return value - (value >> bits - 1 << bits) if value >= 0 else value
        elif str(kind) in ("f32", "f64"):
            return float(text)
    except ValueError:
        pass
    raise GuestRefused(f"{name}: {text[:80]} is not a value of the type {kind}")


_BITS = {"i32": 32, "i64": 64}


def _text(value: object, kind: wasmtime.ValType) -> str:
    """The value as `wasmtime run --invoke` prints it: the shortest decimal digits that give the same
    number."""
    if not isinstance(value, float):
        return (
            str(value) if isinstance(value, int) else "<null reference>" if value is None else "<reference>"
        )
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    digits = repr(value)
    if str(kind) == "f32":
        shorter = (f"{value:.{count}g}" for count in range(1, 10))
        digits = next(
            each for each in shorter if struct.unpack("f", struct.pack("f", float(each)))[0] == value
        )
    from decimal import Decimal

    return f"{Decimal(digits):f}".removesuffix(".0")


WASI_P1 = ("wasi_snapshot_preview1", "wasi_unstable")


def _proc_exit(code: int) -> None:
    """Replaces wasmtime's proc_exit, which loses codes from 126 up."""
    raise _Exit(code)


def _run_component(
    guest: Guest,
    parts: "component.Component",
    store: wasmtime.Store,
    deterministic: bool,
    begin: Callable[[], None],
) -> int:
    from wasmtime import component

    name = _entry(guest, parts)
    linker = component.Linker(guest.engine)
    linker.allow_shadowing = True
    linker.add_wasip2()
    if deterministic:
        make_component_deterministic(linker)
    begin()
    instance = linker.instantiate(store, parts)
    interface = instance.get_export_index(store, name)
    index = instance.get_export_index(store, "run", interface)
    func = None if index is None else instance.get_func(store, index)
    if func is None:
        raise GuestRefused(f"{guest.name} exports {name} without its function run")
    result = func(store)
    return 0 if result.tag == "ok" else 1


def _entry(guest: Guest, parts: "component.Component") -> str:
    """The name of the exported wasi:cli/run. Raises GuestRefused, which names the exports if there is
    none."""
    kind = parts.type
    exports = list(kind.exports(guest.engine))
    for name in exports:
        if _RUN.fullmatch(name):
            return name
    for name in [*exports, *kind.imports(guest.engine)]:
        if _PREVIEW_3.fullmatch(name.encode()):
            raise GuestRefused(_preview_3(guest.name, name))
    what = f"it exports {', '.join(exports[:3])}" if exports else "it exports nothing"
    raise GuestRefused(f"{guest.name} is not a command: {what}, not wasi:cli/run@0.2")


# -- a deterministic clock and random numbers --------------------------------------------------------------

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
