"""What a guest may use at most: `-W name=value,...` in wasmtime's manner, parsed once into frozen numbers. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from ipfsfuse.errors import UsageError
from runner import values


class Limits(NamedTuple):
    """None is no limit of ours. Sizes are in bytes, the time in seconds."""

    timeout: float | None = None
    """From the guest's first instruction, whatever it does, a read that waits included."""
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
    """Descriptors of the guest's process, the few that wasmtime needs included."""
    max_stdout: int | None = None

    def over(self, other: "Limits") -> "Limits":
        """These limits, and where there is none here, the other's."""
        return other._replace(**{name: value for name, value in self._asdict().items() if value is not None})


NO_LIMITS = Limits()

MIN_OPEN_FILES = 32
MAX_STACK = 1 << 30
_FUEL_MAX = (1 << 64) - 1
_SIZES = {"max_memory_size", "max_wasm_stack", "max_stdout"}


def parse(given: Sequence[str]) -> Limits:
    """The limits of every `-W` argument together, the last word on each. Raises UsageError."""
    found: dict[str, int | float] = {}
    for item in ",".join(given).split(",") if given else ():
        name, _, text = item.partition("=")
        field = name.replace("-", "_")
        if field not in Limits._fields:
            known = ", ".join(each.replace("_", "-") for each in Limits._fields)
            raise UsageError(f"-W {item or given[0]} is no limit; there are {known}")
        if field == "timeout":
            found[field] = values.duration(name, text)
        elif field in _SIZES:
            found[field] = values.size(name, text)
        else:
            found[field] = values.count(name, text)
    limits = Limits(**found)  # type: ignore[arg-type] # the names decide the types
    _check(limits)
    return limits


def _check(limits: Limits) -> None:
    if limits.max_open_files is not None and limits.max_open_files < MIN_OPEN_FILES:
        raise UsageError(f"max-open-files={limits.max_open_files} is too few: wasmtime itself needs some, give {MIN_OPEN_FILES} or more")
    if limits.max_wasm_stack is not None and not 0 < limits.max_wasm_stack <= MAX_STACK:
        raise UsageError(f"max-wasm-stack={limits.max_wasm_stack} is not between 1 and {MAX_STACK}")
    if limits.fuel is not None and limits.fuel > _FUEL_MAX:
        raise UsageError(f"fuel={limits.fuel} is more than wasmtime can count")
