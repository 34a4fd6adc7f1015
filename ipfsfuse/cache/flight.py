"""What `flights` are made of: a fetch, and the flight of each key that it brings.

Concurrency: the event loop's.
"""

import math
from typing import Generic, TypeVar

import trio

from ipfsfuse.sources.base import current_request

V = TypeVar("V")


class Fetch:
    """One running fetch, of one key or of a run of them."""

    __slots__ = ("abandoned", "interest", "request", "scope")

    def __init__(self) -> None:
        self.request = current_request().for_fetch()
        """On whose account it runs: first of who began it, then also of who waits for it."""
        self.interest = 0
        self.abandoned = False
        self.scope = trio.CancelScope()

    def join(self, until: float = math.inf) -> None:
        """One more waits for it, `until` then at most."""
        self.interest += 1
        self.request.join(current_request(), until)

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
