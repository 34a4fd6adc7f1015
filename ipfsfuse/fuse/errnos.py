"""The one table of errnos: a domain exception in, what the kernel is told out."""

import errno
import logging

import pyfuse3
import trio

from ipfsfuse import errors

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
    errors.BlockTooLarge: errno.EIO,
    errors.Unsupported: errno.ENOTSUP,
    errors.Unavailable: errno.ETIMEDOUT,
    errors.Interrupted: errno.EINTR,
    errors.NotHere: errno.ETIMEDOUT,
    errors.SourceFailed: errno.ETIMEDOUT,
    errors.StoreFailed: errno.EIO,
}


def of(exc: BaseException) -> int:
    """The errno for anything that a handler raised. What no one foresaw is EIO, and its traceback is logged."""
    if isinstance(exc, BaseExceptionGroup):
        return _of_group(exc)
    for kind in type(exc).__mro__:
        if kind in TABLE:
            return TABLE[kind]
    if isinstance(exc, MemoryError):
        return errno.ENOMEM
    log.error("a request failed in a way that no one foresaw", exc_info=exc)
    return errno.EIO


def _of_group(group: BaseExceptionGroup[BaseException]) -> int:
    """Of a group that a nursery raised: its first error that is not a cancellation."""
    real = [exc for exc in group.exceptions if not isinstance(exc, trio.Cancelled)]
    return of(real[0]) if real else errno.EINTR


def fuse_error(exc: BaseException) -> pyfuse3.FUSEError:
    """What to raise to pyfuse3: it ends the mount for any other exception."""
    return exc if isinstance(exc, pyfuse3.FUSEError) else pyfuse3.FUSEError(of(exc))
