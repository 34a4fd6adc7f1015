"""The errno for each error."""

import errno
import inspect

import pyfuse3
import pytest

from ipfsfuse import errors
from ipfsfuse.fuse import errnos
from ipfsfuse.fuse.errnos import FailureLog


@pytest.mark.logs("a call was answered")
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
def test_each_error_has_its_errno(raised: Exception, expected: int) -> None:
    assert errnos.fuse_error(raised).errno == expected


def test_a_fuse_error_stays_as_it_is() -> None:
    given = pyfuse3.FUSEError(errno.ENODATA)
    assert errnos.fuse_error(given) is given


@pytest.mark.logs("failed unexpectedly")
def test_an_unexpected_error_is_eio_and_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    assert errnos.of(RuntimeError("surprise")) == errno.EIO
    assert caplog.records[0].exc_info is not None


def test_every_error_that_a_request_can_raise_has_a_row() -> None:
    not_in_requests = {"UsageError", "MountFailed", "DaemonFailed", "AddFailed"}
    all_of_them = {
        kind for name, kind in inspect.getmembers(errors, inspect.isclass) if name not in not_in_requests
    }
    rows = {kind for kind in all_of_them if set(kind.__mro__) & set(errnos.TABLE)}
    assert all_of_them - rows == {errors.IpfsFuseError}


@pytest.mark.logs("a call was answered")
def test_each_kind_of_failure_is_logged_once_in_ten_seconds_with_the_number_of_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    log = FailureLog(lambda: now)
    for number in range(1000):
        log.note(errors.Unavailable(f"bafy{number}: gw says 504\n2026 ERROR forged\x1b[31m"), errno.ETIMEDOUT)
        log.note(errors.WrongBlock("bafywrong"), errno.EIO)
        log.note(errors.NotFound("nothing to look into"), errno.ENOENT)
        now += 0.01
    now = 12.0
    log.note(errors.Unavailable("bafylast"), errno.ETIMEDOUT)
    assert [record.getMessage() for record in caplog.records] == [
        "a call was answered ETIMEDOUT: bafy0: gw says 504\\n2026 ERROR forged\\x1b[31m",
        "a call was answered EIO: bafywrong",
        "a call was answered ETIMEDOUT: bafylast (999 more like it in the 12 s before)",
    ]


@pytest.mark.logs("a call was answered")
def test_a_repeated_unexpected_error_leaves_one_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    log = FailureLog(lambda: now)
    for _ in range(100):
        log.note(ZeroDivisionError("a bug"), errno.EIO, expected=False)
    (record,) = caplog.records
    assert record.exc_info is not None
