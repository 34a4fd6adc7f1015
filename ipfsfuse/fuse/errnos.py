"""The one table of errnos: a domain exception in, what the kernel is told out."""

import errno

import pyfuse3
import trio

from ipfsfuse import errors
from ipfsfuse.fuse.failures import failures

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
    """The errno for anything that a handler raised, which goes to the log (see `failures`). What no one
    foresaw is EIO."""
    if isinstance(exc, BaseExceptionGroup):
        return _of_group(exc)
    no_memory = errno.ENOMEM if isinstance(exc, MemoryError) else 0
    number = next((TABLE[kind] for kind in type(exc).__mro__ if kind in TABLE), no_memory)
    failures.note(exc, number or errno.EIO, foreseen=bool(number))
    return number or errno.EIO


def _of_group(group: BaseExceptionGroup[BaseException]) -> int:
    """Of a group that a nursery raised: its first error that is not a cancellation."""
    real = [exc for exc in group.exceptions if not isinstance(exc, trio.Cancelled)]
    return of(real[0]) if real else errno.EINTR


def fuse_error(exc: BaseException) -> pyfuse3.FUSEError:
    """What to raise to pyfuse3: it ends the mount for any other exception."""
    return exc if isinstance(exc, pyfuse3.FUSEError) else pyfuse3.FUSEError(of(exc))
