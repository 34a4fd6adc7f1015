"""What is kept behind the readers who have it already, within a bound.

Concurrency: the event loop's.
"""

from collections.abc import Awaitable, Callable

import trio

MOST = 4 << 20
"""Bytes that readers may have been given and that are not written yet: more would let a fast source outrun a slow disk."""


class Behind:
    def __init__(self) -> None:
        self._bytes = 0

    async def keep(self, size: int, give: Callable[[], None] | None, keep: Callable[[], Awaitable[None]]) -> None:
        """Awaits `keep()`, of `size` bytes. Before, where the bound allows, it calls `give`, if that is asked for; then nothing
        cancels the keeping any more: what was read is kept, if the mount ends meanwhile too."""
        if give is None or self._bytes + size > MOST:
            await keep()
            return
        self._bytes += size
        give()
        try:
            with trio.CancelScope(shield=True):
                await keep()
        finally:
            self._bytes -= size
