"""What `flights` are made of: a fetch, and the flight of each key that it brings.

Concurrency: the event loop's.
"""

from typing import Generic, TypeVar

import trio

V = TypeVar("V")


class Fetch:
    """One running fetch, of one key or of a run of them."""

    __slots__ = ("abandoned", "interest", "scope")

    def __init__(self) -> None:
        self.interest = 0
        self.abandoned = False
        self.scope = trio.CancelScope()

    def leave(self) -> None:
        self.interest -= 1
        if self.interest == 0:
            self.abandoned = True
            self.scope.cancel()


class Flight(Generic[V]):
    __slots__ = ("done", "ended", "error", "fetch", "landed", "value")

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self.done = trio.Event()
        """The value is there, or why it is not."""
        self.ended = trio.Event()
        """And it is kept where it was to be kept."""
        self.landed = False
        self.value: V | None = None
        self.error: Exception | None = None
