"""The limits of a guest: parses `-W name=value,...`, as wasmtime writes them, into frozen numbers. Pure.

The limits in a receipt pass the same check as those of the command line."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ipfsfuse import units
from ipfsfuse.errors import UsageError


class Limits(NamedTuple):
    """None means no limit, or the default named here. Sizes are in bytes, times in seconds."""

    timeout: float | None = None
    """For the run, from the guest's first instruction. The time in which a read waits counts too."""
    compile_timeout: float | None = None
    """For the compilation before the run; COMPILE_TIMEOUT by default."""
    compile_memory: int | None = None
    """Bytes that the compiling process may write to; COMPILE_MEMORY by default."""
    fuel: int | None = None
    """wasmtime's fuel: about one per instruction."""
    max_memory_size: int | None = None
    """For each linear memory."""
    max_wasm_stack: int | None = None
    max_table_elements: int | None = None
    """For each table."""
    max_instances: int | None = None
    """A component adapted from preview 1 needs 4 or 5."""
    max_tables: int | None = None
    max_memories: int | None = None
    max_open_files: int | None = None
    """Descriptors of the guest's process. wasmtime needs a few of them."""
    max_stdout: int | None = None
    """For standard output, and the same for standard error."""
    max_out: int | None = None
    """By how much the writable folders together may grow; MAX_OUT by default."""
    max_fetch: int | None = None
    """For what the sources send. A run with this limit has a mount of its own."""
    max_stdin: int | None = None
    """For standard input that is recorded or replayed."""

    @property
    def compile_seconds(self) -> float:
        return COMPILE_TIMEOUT if self.compile_timeout is None else self.compile_timeout

    @property
    def compile_bytes(self) -> int:
        return COMPILE_MEMORY if self.compile_memory is None else self.compile_memory

    @property
    def out_bytes(self) -> int:
        return MAX_OUT if self.max_out is None else self.max_out

    def with_defaults(self, defaults: "Limits") -> "Limits":
        """These limits, with `defaults` for each that is None."""
        return defaults._replace(
            **{name: value for name, value in self._asdict().items() if value is not None}
        )


NO_LIMITS = Limits()

COMPILE_TIMEOUT = 300.0
COMPILE_MEMORY = 4 << 30
MAX_OUT = 1 << 30
MIN_OPEN_FILES = 32
"""wasmtime itself needs some."""
MAX_STACK = 1 << 30

DURATIONS = frozenset({"timeout", "compile_timeout"})
SIZE_LIMITS = frozenset(
    {"compile_memory", "max_memory_size", "max_wasm_stack", "max_stdout", "max_out", "max_stdin", "max_fetch"}
)
STORE_LIMITS = ("max_memory_size", "max_table_elements", "max_instances", "max_tables", "max_memories")
"""The limits that wasmtime itself enforces, in the order of `Store.set_limits`."""
PROPOSALS = frozenset(
    {"bulk-memory", "component-model", "exceptions", "extended-const", "function-references", "gc"}
    | {"memory64", "multi-memory", "multi-value", "reference-types", "relaxed-simd", "simd", "tail-call"}
    | {"threads", "wide-arithmetic"}
)
"""Proposals that `wasmtime run -W` can switch on, and that are always on here."""
_YEAR = 366 * 86400.0
_RANGES: Mapping[str, tuple[float, float]] = {
    "timeout": (0.001, _YEAR),
    "compile_timeout": (0.001, _YEAR),
    "fuel": (0, (1 << 64) - 1),
    "max_wasm_stack": (1, MAX_STACK),
    "max_open_files": (MIN_OPEN_FILES, (1 << 31) - 1),
}
_ANY = (0, (1 << 63) - 1)
"""The range of all other limits: wasmtime's numbers have 64 bits."""


def parse(given: Sequence[str]) -> Limits:
    """The limits of all `-W` arguments; the last value of each counts. Raises UsageError."""
    found: dict[str, int | float] = {}
    for item in ",".join(given).split(",") if given else ():
        name, _, text = item.partition("=")
        field = name.replace("-", "_")
        if name in PROPOSALS and text in ("", "y", "yes", "true"):
            continue
        if field not in Limits._fields:
            raise UsageError(
                f"-W {item[:80] or given[0]} is not a limit; there are "
                f"{', '.join(map(option, Limits._fields))}"
            )
        found[field] = _number(field, text)
    return checked(found)


def from_names(given: Mapping[str, float | str]) -> Limits:
    """The limits that a Python program gives: numbers, or texts as on the command line. Raises UsageError."""
    return checked(
        {
            name: _number(name, value) if isinstance(value, str) and name in Limits._fields else value
            for name, value in given.items()
        }
    )


def _number(field: str, text: str) -> int | float:
    convert = (
        units.duration if field in DURATIONS else units.size_or_zero if field in SIZE_LIMITS else units.count
    )
    try:
        return convert(text)
    except UsageError as exc:
        raise UsageError(f"-W {option(field)}: {exc}") from exc


def checked(numbers: Mapping[str, object]) -> Limits:
    """Limits from numbers by field name. Raises UsageError for a number that can't be the limit."""
    for name, value in numbers.items():
        if name not in Limits._fields:
            raise UsageError(f"{name[:80]} is not a limit")
        kinds = (int, float) if name in DURATIONS else (int,)
        # an integer from JSON may be larger than any float: `math.isfinite` would raise OverflowError
        if type(value) not in kinds or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise UsageError(f"{option(name)}={value!s:.80} is not a number that can be a limit")
        low, high = _RANGES.get(name, _ANY)
        if not low <= value <= high:
            raise UsageError(
                f"{option(name)}={value_text(name, value)} is not between {value_text(name, low)} and "
                f"{value_text(name, high)}"
            )
    return Limits(**numbers)  # type: ignore[arg-type] # checked above


def option(name: str) -> str:
    """The field `name` as -W has it."""
    return name.replace("_", "-")


def value_text(name: str, value: float) -> str:
    """`value` of the field `name` as -W has it."""
    if name in DURATIONS:
        return units.duration_text(value)
    return units.size_text(int(value)) if name in SIZE_LIMITS else str(int(value))
