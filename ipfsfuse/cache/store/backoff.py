"""What is wrong with the disk just now. Reads go on uncached; `status` says why, and the log once.

Concurrency: the event loop's.
"""

import logging

import trio

log = logging.getLogger(__name__)

RETRY = 5.0
"""Seconds after a failure in which nothing is written."""


class WriteBackoff:
    def __init__(self) -> None:
        self.text = ""
        """What is wrong, "" where nothing is."""
        self._until = 0.0

    @property
    def waiting(self) -> bool:
        """Whether it is too early to try again."""
        return bool(self.text) and trio.current_time() < self._until

    def note(self, what: str, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = reason if reason.startswith(what) else f"{what}: {reason}"
        if not self.text:
            log.warning("%s; reads go on without the cache", text)
        self.text = text
        self._until = trio.current_time() + RETRY

    def over(self) -> None:
        if self.text:
            log.info("the cache can be written again")
            self.text = ""
