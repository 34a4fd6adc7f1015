"""The record of a mount: the blocks that were used, in the order of first use, as JSON lines.

Concurrency: called on the event loop. A line is written before the mount returns the block.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import StoreFailed

MIN_USES_KEPT = 200_000
"""At least so many uses are remembered, and at most twice as many, in some 60 MB."""


class UseRecord:
    """Writes `{"cid": ..., "use": "read" | "ahead"}` once for each CID and use. After MIN_USES_KEPT other
    uses, a use may be written again."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._seen: set[tuple[Cid, bool]] = set()
        self._before: set[tuple[Cid, bool]] = set()

    @classmethod
    @contextmanager
    def create(cls, path: Path) -> Iterator["UseRecord"]:
        """Opens a record in the file `path` for the length of the block. Raises StoreFailed."""
        try:
            out = path.open("w", encoding="utf-8")
        except OSError as exc:
            raise StoreFailed(f"the record {path} can't be written: {exc.strerror}") from exc
        with out:
            yield cls(out)

    def __call__(self, cid: Cid, ahead: bool) -> None:
        if self._is_remembered((cid, ahead)) or (ahead and self._is_remembered((cid, False))):
            return
        self._remember((cid, ahead))
        try:
            self._out.write(json.dumps({"cid": cids.text(cid), "use": "ahead" if ahead else "read"}) + "\n")
            self._out.flush()
        except OSError as exc:  # a record with a gap would be worse than a read that fails
            raise StoreFailed(f"the record can't be written: {exc.strerror}") from exc

    def _is_remembered(self, use: tuple[Cid, bool]) -> bool:
        """Whether this use was written already."""
        return use in self._seen or use in self._before

    def _remember(self, use: tuple[Cid, bool]) -> None:
        if len(self._seen) >= MIN_USES_KEPT:
            self._before, self._seen = self._seen, set()
        self._seen.add(use)
