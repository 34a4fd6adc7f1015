"""All that the commands print: lines, tables, answers of a mount, progress, and the reasons of failures.

What is printed for people is escaped here, so that no command has to think of it. Names of files, messages of
gateways and nodes, and arguments can hold escape codes, which a terminal would obey, and line ends, which
would forge lines. No other module of `cli` prints (ruff's rule T20 holds that).
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ipfsfuse.errors import IpfsFuseError
from ipfsfuse.text import printable
from ipfsfuse.units import human


def line(text: str) -> None:
    """One line of the command's output."""
    print(printable(text))


def note(text: str) -> None:
    """One line on standard error: a reason, a warning, progress."""
    print(printable(text), file=sys.stderr)


def values(value: object, indent: int | None = 2) -> None:
    """Output for programs: JSON in ASCII, so that every control character in it is escaped by JSON's own
    rules."""
    print(json.dumps(value, indent=indent).replace("\x7f", "\\u007f"), flush=True)


def unwrapped(exc: BaseException) -> BaseException:
    """The first exception inside what nurseries wrapped."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def one_line(exc: BaseException) -> str:
    """Why it failed, printable: what came from outside may be in it."""
    if isinstance(exc, IpfsFuseError):
        said = str(exc)
    elif isinstance(exc, OSError):
        said = f"{exc.filename}: {exc.strerror}" if exc.filename is not None else str(exc)
    else:
        said = (
            f"an error that nobody foresaw, {type(exc).__name__}: {str(exc).strip()} "
            "(IPFSFUSE_TRACEBACK=1 shows where)"
        )
    return printable(said.strip())


SIZES = ("budget", "effective_budget", "reserve", "free", "size", "staged", "used", "freed", "pinned")


def show(answer: Mapping[str, Any], indent: str = "") -> None:
    """What lies inside a value is indented below its key."""
    for key, inner in answer.items():
        label = f"{indent}{_label(key)}:"
        if isinstance(inner, dict):
            line(label)
            show(inner, indent + "  ")
        elif isinstance(inner, list):
            line(label if inner else f"{label} none")
            for item in inner:
                line(f"{indent}  {said('', item)}")
        else:
            line(f"{label} {said(key, inner)}")


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same keys, one line each below a line of the keys; numbers to the right."""
    if not rows:
        line(f"{name}: none")
        return
    line(f"{name}:")
    cells = [
        [_label(key) for key in rows[0]],
        *([printable(said(key, value)) for key, value in row.items()] for row in rows),
    ]
    right = [isinstance(value, int | float | None) for value in rows[0].values()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row_cells in cells:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row_cells, widths, right, strict=True)
        ]
        line(f"  {'  '.join(padded)}".rstrip())


def status(answer: Mapping[str, Any]) -> None:
    """What `status` says."""
    show({key: value for key, value in answer.items() if key not in ("pins", "sources")})
    table("pins", [{"node": name, **values} for name, values in answer["pins"].items()])
    table(
        "sources",
        [
            {**{key: value for key, value in source.items() if key != "why"}, "why": source["why"]}
            for source in answer["sources"]
        ],
    )


def ls(answer: Mapping[str, Any]) -> None:
    """What `ls` says: a line for each staging file, one for all that lies in packs."""
    for each in answer["entries"]:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(each["last_used"]))
        whole = "whole" if each["complete"] else f"{human(each['staged'])} of"
        marks = f"pinned:{each['pinned']}" if each["pinned"] else ""
        line(
            f"{each['cid']}  {whole:>12} {human(each['size']):>10}  {used}  {each['source']:10} "
            f"{marks}".rstrip()
        )
    small = answer["small"]
    if small["bytes"]:
        line(
            f"and {small['blocks']} small blocks (files up to 64 KiB, directories, links): "
            f"{human(small['bytes'])}"
        )


def said(key: str, value: object) -> str:
    """One value in one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "-"
    if isinstance(value, int) and (key in SIZES or key.endswith("bytes")):
        return human(value)
    if isinstance(value, float):
        return _seconds(value) if key in ("median", "p95") else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{_label(name)} {said(name, inner)}" for name, inner in value.items()) or "none"
    return str(value)


def _seconds(value: float) -> str:
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def _label(key: str) -> str:
    return key.replace("_", " ")


if TYPE_CHECKING:
    from tqdm import tqdm

PLAIN_SECONDS = 5.0
"""A plain line at most this often: a log is read afterwards."""


class Progress:
    """Shows `{"done": n, "total": n or None, "unit": "B", "what": text}`, every key but `done` optional."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: tqdm[Any] | None = None
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, values: Mapping[str, Any]) -> None:
        done, total, unit = values.get("done", 0), values.get("total"), values.get("unit", "B")
        if sys.stderr.isatty():
            self._show_bar(done, total, unit, values.get("what"))
        elif time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            note(f"{self._what}: {_amount(done, unit)}" + (f" of {_amount(total, unit)}" if total else ""))

    def of_file(self, name: str, done: int, total: int) -> None:
        """As when called: `done` of `total` bytes of the file `name`."""
        self({"done": done, "total": total, "what": name})

    def line(self, text: str) -> None:
        """Prints a line of the command's own output, not through the bar."""
        if self._bar is not None:
            self._bar.clear()
        line(text)

    def _show_bar(self, done: int, total: int | None, unit: str, detail: str | None) -> None:
        detail = detail and printable(detail)[:40]
        if self._bar is None:
            from tqdm import tqdm  # 30 ms to import, and only a terminal needs it

            how: dict[str, Any] = {"unit": unit, "unit_scale": True, "unit_divisor": 1024, "leave": False}
            self._bar = tqdm(desc=self._what, total=total, postfix=detail, file=sys.stderr, **how)
        if detail is not None:
            self._bar.set_postfix_str(detail, refresh=False)
        self._bar.total = total
        self._bar.update(done - self._bar.n)


def _amount(count: int, unit: str) -> str:
    return human(count) if unit == "B" else f"{count} {unit}"
