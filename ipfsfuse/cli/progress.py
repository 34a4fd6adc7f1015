"""Progress on standard error: a bar on a terminal, elsewhere a plain line now and then."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ipfsfuse.cli import console
from ipfsfuse.text import printable
from ipfsfuse.units import human

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
            console.note(
                f"{self._what}: {_amount(done, unit)}" + (f" of {_amount(total, unit)}" if total else "")
            )

    def of_file(self, name: str, done: int, total: int) -> None:
        """As when called: `done` of `total` bytes of the file `name`."""
        self({"done": done, "total": total, "what": name})

    def line(self, text: str) -> None:
        """Prints a line of the command's own output, not through the bar."""
        if self._bar is not None:
            self._bar.clear()
        console.line(text)

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
