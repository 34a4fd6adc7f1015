"""Rules for all tests: tests that need FUSE are skipped without it, each warning in the log must be expected,
and no process outlives its `with` block."""

import functools
import importlib.util
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import hypothesis
import pytest

import ipfsfuse.fuse as _before_pyfuse3  # noqa: F401  # our C code can intercept libfuse's calls only if it is loaded first
from tests.mounting import Home

hypothesis.settings.register_profile(
    "shared-machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared-machine")

_leave = subprocess.Popen.__exit__


def _kill_and_leave(
    process: "subprocess.Popen[Any]",
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    """Kills the process of a `with` block that has failed: Popen would wait for it forever."""
    if kind is not None:
        process.kill()
    _leave(process, kind, error, trace)


subprocess.Popen.__exit__ = _kill_and_leave  # type: ignore[method-assign]

pytest_plugins = ["tests.kubo.fixtures"] if importlib.util.find_spec("tests.kubo.fixtures") else []

NEED_FUSE = ("tests/mount/", "tests/faults/", "tests/network/")
KUBO_FIXTURES = {"kubo_node", "own_node", "two_nodes"}


@functools.cache
def why_no_fuse() -> str | None:
    """Why nothing can be mounted here, or None if it can. Tries to mount."""
    if shutil.which("fusermount3") is None:
        return "there is no fusermount3"
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
            made = subprocess.run(
                ["fusermount3", "--", folder],
                pass_fds=[theirs.fileno()],
                capture_output=True,
                text=True,
                env=environment,
            )
            if made.returncode:
                return made.stderr.strip() or "fusermount3 fails"
            _data, files, _flags, _address = socket.recv_fds(ours, 1, 1)
            for file in files:
                os.close(file)
        subprocess.run(["fusermount3", "-u", "-z", folder], capture_output=True)
    return None


def pytest_configure() -> None:
    """Programs that the tests start must run as on a user's machine. A suite in the background ignores Ctrl-C,
    and containers often set PYTHONUNBUFFERED. The programs must inherit neither."""
    os.environ.pop("PYTHONUNBUFFERED", None)
    for number in (signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        place = item.path.relative_to(config.rootpath).as_posix()
        if place.startswith(NEED_FUSE):
            item.add_marker(pytest.mark.fuse)
        if place.startswith("tests/runner/"):
            item.add_marker(pytest.mark.guest)
        if KUBO_FIXTURES.intersection(getattr(item, "fixturenames", ())) or place.startswith("tests/kubo/"):
            item.add_marker(pytest.mark.kubo)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("fuse") and (reason := why_no_fuse()):
        if os.environ.get("CI") == "true":
            pytest.fail(f"needs FUSE: {reason}", pytrace=False)
        pytest.skip(f"needs FUSE: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if count := sum("needs FUSE" in str(report.longrepr) for report in skipped):
        terminalreporter.section("not shown here")
        terminalreporter.line(f"{count} tests need FUSE and were skipped: {why_no_fuse()}")


class _Collected(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def expected_logs_only(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that logs a line at WARNING or above that its `logs` marker does not name."""
    collected = _Collected()
    loggers = [logging.getLogger("ipfsfuse"), logging.getLogger("ipfsfuse_run")]
    for logger in loggers:
        logger.addHandler(collected)
    yield
    for logger in loggers:
        logger.removeHandler(collected)
    patterns = [str(pattern) for marker in request.node.iter_markers("logs") for pattern in marker.args]
    unexpected = [
        line for line in collected.lines if not any(re.search(pattern, line) for pattern in patterns)
    ]
    if unexpected:
        pytest.fail("unexpected log lines:\n" + "\n".join(unexpected), pytrace=False)


@pytest.fixture(scope="session")
def conformance() -> Path:
    """The folder of published conformance fixtures beside the checkout. Its tests are skipped without it."""
    folder = Path(__file__).parents[2] / "shared" / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"the conformance fixtures are not at {folder}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def others_may_pass(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Some tests become another user. pytest's folders are accessible only to one user."""
    base = tmp_path_factory.getbasetemp()
    for folder in (base, *base.parents):
        if folder == Path(tempfile.gettempdir()) or folder.stat().st_uid != os.getuid():
            break
        folder.chmod(folder.stat().st_mode | 0o011)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Folders and environment of one imaginary user."""
    return Home(tmp_path / "home")
