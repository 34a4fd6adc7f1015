"""Exceptions as people read them: one line each."""

from ipfsfuse.errors import IpfsFuseError
from ipfsfuse.text import printable


def unwrapped(exc: BaseException) -> BaseException:
    """The first exception inside what nurseries wrapped."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def one_line(exc: BaseException) -> str:
    """Why it failed, printable: what came from outside may be in it."""
    if isinstance(exc, IpfsFuseError):
        said = str(exc)
    elif isinstance(exc, OSError):
        said = f"{exc.filename}: {exc.strerror}" if exc.filename is not None else str(exc)
    else:
        said = (
            f"an error that nobody foresaw, {type(exc).__name__}: {str(exc).strip()} "
            "(IPFSFUSE_TRACEBACK=1 shows where)"
        )
    return printable(said.strip())
