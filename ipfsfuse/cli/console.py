"""Prints the output of all commands: lines, tables, answers of a mount, progress, and the reasons of
failures.

All text for people is escaped here. File names, messages of gateways and nodes, and arguments can contain
escape codes, which a terminal would obey, and line ends, which would forge lines. No other module of `cli`
prints (ruff's rule T20 enforces that).
"""

import argparse
import difflib
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from ipfsfuse.errors import IpfsFuseError, StoreFailed
from ipfsfuse.text import printable
from ipfsfuse.units import human

_SGR = {"red": "31", "green": "32", "yellow": "33"}
"""Select Graphic Rendition (ECMA-48, 8.3.117)."""
COLOURS = {
    "healthy": "green", "good": "green", "ok": "green", "untried": "yellow", "degraded": "yellow",
    "half_open": "yellow", "note": "yellow", "open": "red", "quarantined": "red", "bad": "red",
}  # fmt: skip
"""The colours of words for a state."""


def is_terminal(stream: TextIO | None) -> bool:
    """`stream` is None if it was closed when the program started."""
    return stream is not None and stream.isatty()


def paint(text: str, style: str | None, stream: TextIO | None = None) -> str:
    """`text` in a colour, if `stream` (standard output) is a terminal with colours and the user wants them
    (https://no-color.org). `text` must be printable."""
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    plain = unwanted or not is_terminal(sys.stdout if stream is None else stream)
    return text if style is None or plain else f"\x1b[{_SGR[style]}m{text}\x1b[0m"


def line(text: str) -> None:
    """One line of the command's output."""
    print(printable(text))


def flush() -> None:
    """Flushes the output. Raises OSError."""
    if sys.stdout is not None:
        sys.stdout.flush()


def text(content: str) -> None:
    """Prints lines in which all foreign text is escaped already."""
    print(content, end="")


def write(name: str, content: str) -> None:
    """Makes or replaces the file `name`. Raises StoreFailed; then nothing has changed."""
    from ipfsfuse.fileio.files import replace_text  # late: it loads our C

    try:
        replace_text(Path(name), content)
    except OSError as exc:
        raise StoreFailed(f"{name} can't be written: {exc.strerror}") from exc


def note(text: str) -> None:
    """One line on standard error: a reason, a warning, progress."""
    if sys.stderr is not None:  # with None `print` writes to standard output
        print(printable(text), file=sys.stderr)


def failure(exc: BaseException) -> None:
    """Prints why the command fails, on standard error."""
    if sys.stderr is not None:
        hint = "" if _has_working_directory() else " (the working directory is gone: cd to another)"
        print(f"{paint('ipfsfuse:', 'red', sys.stderr)} {one_line(exc)}{hint}", file=sys.stderr)


def _has_working_directory() -> bool:
    try:
        return bool(os.getcwd())
    except OSError:
        return False


def failure_values(exc: BaseException, code: int) -> dict[str, Any]:
    """Prints why the command fails as JSON, on standard output."""
    return {"error": one_line(exc), "kind": type(exc).__name__, "code": code}


def values(value: object, indent: int | None = 2) -> None:
    """Prints JSON in ASCII: so the rules of JSON escape every control character."""
    print(json.dumps(value, indent=indent).replace("\x7f", "\\u007f"), flush=True)


def answer(arguments: argparse.Namespace, value: object, *lines: str) -> int:
    """Prints the result of a command: `value` with --json, else `lines`. Returns the exit code 0."""
    if arguments.json:
        values(value)
    else:
        for each in lines:
            line(each)
    return 0


def listening(arguments: argparse.Namespace, urls: Sequence[str], text: str) -> None:
    """Prints one line: the command answers at `urls` from now on."""
    if arguments.json:
        values({"listening": list(urls), "pid": os.getpid()}, indent=None)
    else:
        line(text)


def suggestion(word: str, known: Iterable[str], otherwise: str) -> str:
    """Advice about an unknown `word`: a question with the most similar of `known`, or `otherwise`."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {close[0]}?" if close else otherwise


def unwrapped(exc: BaseException) -> BaseException:
    """The first exception in an exception group."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def one_line(exc: BaseException) -> str:
    """The reason of a failure. It is printable, even if it contains foreign text."""
    if isinstance(exc, IpfsFuseError):
        message = str(exc)
    elif isinstance(exc, OSError):
        message = f"{exc.filename}: {exc.strerror}" if exc.filename is not None else exc.strerror or str(exc)
        if exc.filename is None and exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            message = f"standard output can't be written: {message}"  # other files have a name
    else:
        message = (
            f"unexpected error, {type(exc).__name__}: {str(exc).strip()} (IPFSFUSE_TRACEBACK=1 shows where)"
        )
    return printable(message.strip())


SIZE_KEYS = ("budget", "effective_budget", "reserve", "free", "size", "staged", "used", "freed", "pinned")


def show(answer: Mapping[str, Any], indent: str = "") -> None:
    """The lines for a value. Values inside it are indented below their keys."""
    for key, inner in answer.items():
        label = f"{indent}{_label(key)}:"
        if isinstance(inner, dict):
            line(label)
            show(inner, indent + "  ")
        elif isinstance(inner, list):
            line(label if inner else f"{label} none")
            for item in inner:
                line(f"{indent}  {formatted('', item)}")
        else:
            _labelled(label, formatted(key, inner))


def _labelled(label: str, text: str) -> None:
    print(f"{printable(label)} {paint(printable(text), COLOURS.get(text))}")


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of rows with the same keys, below a line of the keys. Numbers are aligned to the right. If the
    terminal is too narrow, one line for each value."""
    if not rows:
        line(f"{name}: none")
        return
    line(f"{name}:")
    cells = [
        [_label(key) for key in rows[0]],
        *([printable(formatted(key, value)) for key, value in row.items()] for row in rows),
    ]
    right = [isinstance(value, int | float | None) for value in rows[0].values()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if is_terminal(sys.stdout) and sum(widths) + 2 * len(widths) > shutil.get_terminal_size().columns:
        for row_cells in cells[1:]:
            for number, (label, cell) in enumerate(zip(cells[0], row_cells, strict=True)):
                _labelled(f"  {'  ' if number else ''}{label}:", cell)
        return
    for row_cells in cells:
        padded = [
            paint(cell.rjust(width) if to_right else cell.ljust(width), COLOURS.get(cell))
            for cell, width, to_right in zip(row_cells, widths, right, strict=True)
        ]
        print(f"  {'  '.join(padded)}".rstrip())


def status(answer: Mapping[str, Any]) -> None:
    """The text of `status`."""
    show({key: value for key, value in answer.items() if key not in ("pins", "sources")})
    table("pins", [{"node": name, **values} for name, values in answer["pins"].items()])
    sources = [
        {**{key: value for key, value in source.items() if key != "why"}, "why": source["why"]}
        for source in answer["sources"]
    ]
    table("sources", sources)


def finding(state: str, found: str, todo: str) -> None:
    """The results of `doctor`, with advice."""
    print(f"{paint(f'{state:5}', COLOURS.get(state))}{printable(found)}")
    if todo:
        line(f"     to do: {todo}")


def local_time(iso: str) -> str:
    """A time of an answer, as local time."""
    moment = datetime.fromisoformat(iso)
    with suppress(OverflowError):  # the first and the last day that there is have no other time zones
        moment = moment.astimezone()
    return moment.strftime("%Y-%m-%d %H:%M")


def ls(answer: Mapping[str, Any]) -> None:
    """The text of `ls`: for each staging file a line with its first path, and a line for each other path;
    then one line for all packs."""
    for each in answer["entries"]:
        shown = f"{each['cid']}  {_extent(each)}  {local_time(each['last_used'])}  {each['source']:10} "
        marks = f"pinned:{each['pinned']}  " if each["pinned"] else ""
        first, *others = each["paths"] or [""]
        line(f"{shown}{marks}{first}".rstrip())
        for other in others:
            line(f"    also {other}")
    _small(answer["small"])


def tree(answer: Mapping[str, Any]) -> None:
    """The text of `ls --tree`: all staged paths, each below its directory."""
    shown: list[str] = []
    for each in answer["tree"]:
        parents = each["path"].split("/")
        name = parents.pop() if each["path"].rpartition("/")[0] in shown else each["path"]
        while shown and not each["path"].startswith(f"{shown[-1]}/"):
            shown.pop()
        marks = f"  pinned:{each['pinned']}" if each["pinned"] == "user" else ""
        extent = " " * 23 if each["kind"] == "directory" else _extent(each)
        ending = {"directory": "/", "symlink": "@"}.get(each["kind"], "")
        line(f"{extent}  {'  ' * len(shown)}{name}{ending}{marks}")
        if each["kind"] == "directory":
            shown.append(each["path"])
    nameless = [each for each in answer["entries"] if not each["paths"]]
    if nameless:
        line("by no path that is known:")
    for each in nameless:
        line(f"{_extent(each)}  {each['cid']}")
    _small(answer["small"])


def pins(answer: Mapping[str, Any]) -> None:
    """The text of `pin ls`."""
    for cid in answer["pinned"]:
        names = [path for path in answer["paths"].get(cid, ()) if path != f"/ipfs/{cid}"]
        line(f"{cid}  {'  '.join(names)}".rstrip())
    if not answer["pinned"]:
        line("pinned: none")


def _extent(each: Mapping[str, Any]) -> str:
    """How many bytes of how many are here."""
    whole = "whole" if each["complete"] else f"{human(each['staged'])} of"
    return f"{whole:>12} {human(each['size']):>10}"


def _small(small: Mapping[str, int]) -> None:
    if small["bytes"]:
        line(
            f"and {small['blocks']} small blocks (files up to 64 KiB, directories, links): "
            f"{human(small['bytes'])}"
        )


def formatted(key: str, value: object) -> str:
    """One value in one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "-"
    if isinstance(value, int) and (key in SIZE_KEYS or key.endswith("bytes")):
        return human(value)
    if isinstance(value, float):
        return _seconds(value) if key in ("median", "p95") else f"{value:.3g}"
    if isinstance(value, dict):
        return (
            ", ".join(f"{_label(name)} {formatted(name, inner)}" for name, inner in value.items()) or "none"
        )
    return str(value)


def _seconds(value: float) -> str:
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def _label(key: str) -> str:
    return key.replace("_", " ")


if TYPE_CHECKING:
    from tqdm import tqdm

PLAIN_SECONDS = 5.0
"""Seconds between two plain lines of progress."""


class ProgressBar:
    """Shows progress: a bar in a terminal, else a line now and then."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: tqdm[Any] | None = None
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(
        self, done: int, total: int | None = None, what: str | None = None, unit: str = "B", **_more: object
    ) -> None:
        """Shows that `done` of `total` units of `what` are done. `total` may be unknown. If it is exceeded,
        it was wrong."""
        total = None if total is not None and total < done else total
        if is_terminal(sys.stderr):
            self._show_bar(done, total, unit, what)
        elif time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            note(f"{self._what}: {_amount(done, unit)}" + (f" of {_amount(total, unit)}" if total else ""))

    def of_file(self, name: str, done: int, total: int) -> None:
        """Shows that `done` of `total` bytes of the file `name` are done."""
        self(done, total, name)

    def line(self, text: str) -> None:
        """Prints a line of output without breaking the bar."""
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
