"""The table that maps domain exceptions to errnos. Also the log of failed calls: each kind of failure with
its cause, at a bounded rate.

Concurrency: on the event loop.
"""

import errno
import logging
import time
from collections.abc import Callable
from types import TracebackType

import pyfuse3
import trio

from ipfsfuse import errors
from ipfsfuse.structures import LogLimiter
from ipfsfuse.text import printable

log = logging.getLogger("ipfsfuse.fuse")

TABLE: dict[type[errors.IpfsFuseError], int] = {
    errors.NotFound: errno.ENOENT,
    errors.NotACid: errno.ENOENT,
    errors.NotADirectory: errno.ENOTDIR,
    errors.IsADirectory: errno.EISDIR,
    errors.NotALink: errno.EINVAL,
    errors.NameTooLong: errno.ENAMETOOLONG,
    errors.NotAllowed: errno.EACCES,
    errors.ReadOnly: errno.EPERM,
    errors.WrongBlock: errno.EIO,
    errors.Malformed: errno.EIO,
    errors.WrongRecord: errno.EIO,
    errors.BlockTooLarge: errno.EIO,
    errors.Unsupported: errno.ENOTSUP,
    errors.Unavailable: errno.ETIMEDOUT,
    errors.Interrupted: errno.EINTR,
    errors.NotHere: errno.ETIMEDOUT,
    errors.SourceFailed: errno.ETIMEDOUT,
    errors.QuotaReached: errno.EIO,
    errors.StoreFailed: errno.EIO,
}


FAILURE_LOG_SECONDS = 10.0
"""Seconds between two log lines about one kind of failure."""
LONGEST = 2000
"""Characters of one line."""

ORDINARY = (
    errors.NotFound, errors.NotACid, errors.NotADirectory, errors.IsADirectory, errors.NotALink,
    errors.NameTooLong, errors.ReadOnly, errors.Interrupted,
)  # fmt: skip
"""Errors that programs cause in normal use. They are not logged."""


class FailureLog:
    """Logs failures by their kind, which is the exception's type."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._limiter = LogLimiter(FAILURE_LOG_SECONDS, clock)

    def note(self, exc: BaseException, number: int, *, expected: bool = True) -> None:
        """Logs that a call is answered with the errno `number` because of `exc`; with its traceback if it was
        not `expected`."""
        if isinstance(exc, ORDINARY):
            return
        more = self._limiter.admit(type(exc))
        if more is None:
            return
        answer = errno.errorcode.get(number, str(number))
        if expected:
            log.warning("a call was answered %s: %s%s", answer, printable(str(exc)[:LONGEST]), more)
        else:
            log.error("a call was answered %s: it failed unexpectedly%s", answer, more, exc_info=exc)


failures = FailureLog()
"""The log of this process, which serves one mount."""


def of(exc: BaseException) -> int:
    """The errno for an exception of a handler, which is logged (`FailureLog`). EIO for unexpected
    exceptions."""
    if isinstance(exc, BaseExceptionGroup):  # from a nursery: use its first error that is not a cancellation
        real = [each for each in exc.exceptions if not isinstance(each, trio.Cancelled)]
        return of(real[0]) if real else errno.EINTR
    no_memory = errno.ENOMEM if isinstance(exc, MemoryError) else 0
    number = next((TABLE[kind] for kind in type(exc).__mro__ if kind in TABLE), no_memory)
    failures.note(exc, number or errno.EIO, expected=bool(number))
    return number or errno.EIO


class Translated:
    """A context manager that turns errors into FUSEError: pyfuse3 would end the mount for any other
    exception. It is a class because it is used for each request, and a generator takes 1 us more."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(exc, Exception):
            raise fuse_error(exc) from exc


translated = Translated()


def fuse_error(exc: BaseException) -> pyfuse3.FUSEError:
    """The exception to raise to pyfuse3 for `exc`."""
    return exc if isinstance(exc, pyfuse3.FUSEError) else pyfuse3.FUSEError(of(exc))
