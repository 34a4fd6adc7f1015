"""One guest in wasmtime: what its bytes are, how they are compiled, linked and called, and what its end
means.

Owns nothing beyond the call; runs in the guest's own process, on any one thread.
"""

import ctypes
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import wasmtime
from wasmtime import _ffi

from ipfsfuse_run.errors import GuestRefused
from ipfsfuse_run.limits import Limits

if TYPE_CHECKING:  # 13 ms that a module need not wait for
    from wasmtime import component

MODULE, COMPONENT = "module", "component"
TRAPPED = 134
"""The exit code of a shell for SIGABRT, as `wasmtime run` gives."""

_FIBER_SPARE = 2 << 20
_MAGIC = b"\0asm"
_KINDS = {b"\x01\0\0\0": MODULE, b"\x0d\0\x01\0": COMPONENT}
_RUN = re.compile(r"wasi:cli/run@0\.2(\.\d+)?")
_PREVIEW_3 = re.compile(rb"wasi:[a-z-]+/[a-z-]+@0\.3[0-9a-z.-]*")


class End(NamedTuple):
    """How a guest ended: its exit code, and wasmtime's message with the back-trace where it trapped."""

    code: int
    trap: str | None = None


class _Exit(Exception):
    """Carries proc_exit's code out of the guest."""

    def __init__(self, code: int) -> None:
        self.code = code


class Settings(NamedTuple):
    """What compiled code depends on, besides the module and wasmtime's version."""

    fuel: bool
    max_wasm_stack: int | None
    deterministic: bool


HEAD_BYTES = 8
MAX_BYTES = 256 << 20
"""Of the largest guest."""


def kind_of(head: bytes) -> str | None:
    """What begins with these HEAD_BYTES; None for text, and for what can't run."""
    return _KINDS.get(head[4:]) if head.startswith(_MAGIC) else None


def binary(code: bytes, name: str) -> tuple[str, bytes]:
    """The guest's kind and its binary form (text is translated). Raises GuestRefused."""
    if code.startswith(_MAGIC):
        kind = kind_of(code[:HEAD_BYTES])
        if kind is None:
            raise GuestRefused(f"{name} is WebAssembly of a version that can't run, or cut short")
        return kind, code
    if not code.lstrip().startswith((b"(", b";;")):
        raise GuestRefused(f"{name} is not WebAssembly: it begins with neither \\0asm nor text")
    try:
        return binary(bytes(wasmtime.wat2wasm(code)), name)
    except wasmtime.WasmtimeError as exc:
        raise GuestRefused(f"{name} is no WebAssembly text: {one_line(exc)}") from exc


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def make_engine(settings: Settings) -> wasmtime.Engine:
    """Raises GuestRefused."""
    config = wasmtime.Config()
    config.consume_fuel = settings.fuel
    if settings.max_wasm_stack is not None:
        config.max_wasm_stack = settings.max_wasm_stack
        # wasmtime aborts the process where its fibers' stacks (2 MiB) are smaller; its Python package has no
        # name for them
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

    @property
    def kind(self) -> str:
        return MODULE if isinstance(self.compiled, wasmtime.Module) else COMPONENT


def compile_guest(engine: wasmtime.Engine, kind: str, code: bytes, name: str) -> Guest:
    """Raises GuestRefused."""
    try:
        return Guest(name, engine, form_of(kind)(engine, code))
    except wasmtime.WasmtimeError as exc:
        wanted = _PREVIEW_3.search(code)
        if wanted is not None:
            raise GuestRefused(_preview_3(name, wanted[0].decode())) from exc
        raise GuestRefused(f"{name} is no valid WebAssembly {kind}: {one_line(exc)}") from exc


def form_of(kind: str) -> "type[wasmtime.Module | component.Component]":
    """What compiles and loads a guest of that kind."""
    if kind == MODULE:
        return wasmtime.Module
    from wasmtime import component

    return component.Component


def _preview_3(name: str, wanted: str) -> str:
    return f"{name} asks for {wanted}: WASI preview 3 is not offered, build it for preview 2"


def run(
    guest: Guest, wasi: wasmtime.WasiConfig, limits: Limits, deterministic: bool, begin: Callable[[], None]
) -> End:
    """Runs the guest to its end, calling `begin` right before its first instruction. Raises GuestRefused."""
    store = wasmtime.Store(guest.engine)
    store.set_wasi(wasi)  # before anything else: a store without it aborts the process
    _apply(limits, store)
    try:
        if isinstance(guest.compiled, wasmtime.Module):
            return End(_run_module(guest, guest.compiled, store, deterministic, begin))
        return End(_run_component(guest, guest.compiled, store, deterministic, begin))
    except _Exit as exc:
        return End(_exit_code(exc.code))
    except wasmtime.ExitTrap as exc:
        return End(_exit_code(exc.code))
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
    wanted = (
        limits.max_memory_size,
        limits.max_table_elements,
        limits.max_instances,
        limits.max_tables,
        limits.max_memories,
    )
    store.set_limits(*(-1 if each is None else each for each in wanted))


def _exit_code(code: int) -> int:
    """As the system would cut it to a byte, but never a failure to 0."""
    return code & 0xFF or (1 if code else 0)


def _run_module(
    guest: Guest,
    module: wasmtime.Module,
    store: wasmtime.Store,
    deterministic: bool,
    begin: Callable[[], None],
) -> int:
    names = [each.name for each in module.exports]
    if "_start" not in names:
        raise GuestRefused(f"{guest.name} is a library, not a command: it exports no _start")
    linker = wasmtime.Linker(guest.engine)
    linker.allow_shadowing = True
    linker.define_wasi()
    for module_name in WASI_P1:
        linker.define_func(
            module_name, "proc_exit", wasmtime.FuncType([wasmtime.ValType.i32()], []), _proc_exit
        )
    if deterministic:
        from ipfsfuse_run import determinism

        determinism.fix_module(linker, WASI_P1)
    begin()
    start = linker.instantiate(store, module).exports(store)["_start"]
    if not isinstance(start, wasmtime.Func):
        raise GuestRefused(f"{guest.name} is no command: its _start is no function")
    start(store)
    return 0


WASI_P1 = ("wasi_snapshot_preview1", "wasi_unstable")


def _proc_exit(code: int) -> None:
    """Ours, because wasmtime's loses codes from 126 up."""
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
        from ipfsfuse_run import determinism

        determinism.fix_component(linker)
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
    """The name of the exported wasi:cli/run. Raises GuestRefused, naming what there is instead."""
    kind = parts.type
    exports = list(kind.exports(guest.engine))
    for name in exports:
        if _RUN.fullmatch(name):
            return name
    for name in [*exports, *kind.imports(guest.engine)]:
        if _PREVIEW_3.fullmatch(name.encode()):
            raise GuestRefused(_preview_3(guest.name, name))
    what = f"it exports {', '.join(exports[:3])}" if exports else "it exports nothing"
    raise GuestRefused(f"{guest.name} is no command: {what}, not wasi:cli/run@0.2")
