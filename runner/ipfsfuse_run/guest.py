"""One guest in the wasmtime library: compiles, links and calls it, and interprets how it ended.

Runs in the guest's process, on any one thread. Has no state of its own.
"""

import ctypes
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import wasmtime
from wasmtime import _ffi

from ipfsfuse_run import lockdown
from ipfsfuse_run.code_cache import MODULE, Code, Key, entry_key
from ipfsfuse_run.deterministic import WASI_P1, make_component_deterministic, make_module_deterministic
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
