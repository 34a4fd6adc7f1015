"""The one table of errnos."""

import errno
import inspect

import pyfuse3
import pytest

from ipfsfuse import errors
from ipfsfuse.fuse import errnos


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (errors.NotFound("x"), errno.ENOENT),
        (errors.NotADirectory("x"), errno.ENOTDIR),
        (errors.Unavailable("x"), errno.ETIMEDOUT),
        (errors.WrongBlock("x"), errno.EIO),
        (errors.Malformed("x"), errno.EIO),
        (errors.Unsupported("x"), errno.EOPNOTSUPP),
        (errors.Interrupted("x"), errno.EINTR),
        (errors.NotAllowed("x"), errno.EACCES),
        (errors.ReadOnly("x"), errno.EPERM),
        (errors.NameTooLong("x"), errno.ENAMETOOLONG),
        (ExceptionGroup("g", [ExceptionGroup("h", [errors.WrongBlock("x")])]), errno.EIO),
        (MemoryError(), errno.ENOMEM),
    ],
)
def test_errnos(raised: Exception, expected: int) -> None:
    assert errnos.fuse_error(raised).errno == expected


def test_an_answer_for_the_kernel_stays_as_it_is() -> None:
    given = pyfuse3.FUSEError(errno.ENODATA)
    assert errnos.fuse_error(given) is given


@pytest.mark.logs("no one foresaw")
def test_what_no_one_foresaw_is_eio_and_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    assert errnos.of(RuntimeError("surprise")) == errno.EIO
    assert caplog.records[0].exc_info is not None


def test_every_error_of_ours_that_a_request_can_meet_has_its_row() -> None:
    elsewhere = {"UsageError", "MountFailed", "DaemonFailed", "AddFailed"}
    all_of_them = {kind for name, kind in inspect.getmembers(errors, inspect.isclass) if name not in elsewhere}
    rows = {kind for kind in all_of_them if set(kind.__mro__) & set(errnos.TABLE)}
    assert all_of_them - rows == {errors.IpfsFuseError}
