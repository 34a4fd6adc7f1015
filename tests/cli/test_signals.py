"""What signals do to a mount and its log: with real daemons, and with a mount in the foreground of a terminal
that hangs up."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mounting import PATIENCE, Home, Mounted, alive, fuse_mounts, wait_until

pytestmark = pytest.mark.fuse

HARMLESS = [
    signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR, signal.SIGHUP,
    signal.SIGPIPE, signal.SIGXFSZ, signal.SIGRTMIN, signal.SIGRTMAX,
]  # fmt: skip


@pytest.fixture
def cid(user: Home) -> str:
    (user.folder / "hello.txt").write_text("hello\n")
    return user.add("-w", user.folder / "hello.txt")


def reads(mount: Mounted, cid: str) -> None:
    assert (mount.path / cid / "hello.txt").read_text() == "hello\n"
    assert alive(mount.pid)


def test_a_daemon_outlives_every_stray_signal(user: Home, cid: str) -> None:
    with user.mounted() as mount:
        for number in HARMLESS:
            os.kill(mount.pid, number)
            assert mount.status()["pid"] == mount.pid, number
            reads(mount, cid)
        wait_until(lambda: "this log was opened anew" in mount.log(), "the log was opened anew")
        (status,) = [line for line in mount.log().splitlines() if "status: up" in line]
        assert "library good, " in status
        assert "no trouble" in status


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGXCPU, signal.SIGTERM])
def test_a_signal_that_ends_the_daemon_unmounts_though_a_file_is_open(
    user: Home, cid: str, number: signal.Signals
) -> None:
    with user.mounted() as mount:
        file = os.open(mount.path / cid / "hello.txt", os.O_RDONLY)
        os.kill(mount.pid, number)
        wait_until(lambda: not alive(mount.pid), "the daemon has ended")
        assert not fuse_mounts(user.folder)
        assert f"{number.name}: unmounting" in mount.log()
        assert "unmounted, while it was still in use" in mount.log()
        with suppress(OSError):  # the daemon is gone, so close may fail
            os.close(file)


def test_a_signal_ends_a_mount_though_fusermount3_is_gone(user: Home, cid: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root unmounts without fusermount3")
    tools = user.folder / "tools"
    tools.mkdir()
    (tools / "fusermount3").symlink_to(
        subprocess.run(["which", "fusermount3"], capture_output=True, text=True).stdout.strip()
    )
    user.env["PATH"] = str(tools)
    with user.mounted() as mount:
        reads(mount, cid)
        (tools / "fusermount3").unlink()
        os.kill(mount.pid, signal.SIGTERM)
        wait_until(lambda: not alive(mount.pid), "the daemon has ended")
        wait_until(lambda: not fuse_mounts(user.folder), "the helper has unmounted it")
        assert "Traceback" not in mount.log()


TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, "-m", "ipfsfuse", "mount", "--foreground", "--json", sys.argv[2]])
"""


@contextmanager
def in_the_foreground(user: Home, how: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A mount in the foreground of a terminal of its own, and the other end of the terminal."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", TERMINAL, how, str(user.mountpoint)]
    with subprocess.Popen(
        command,
        env=user.env,
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
        start_new_session=True,
    ) as daemon:
        os.close(follower)
        assert daemon.stdout is not None
        assert json.loads(daemon.stdout.readline())["pid"] == daemon.pid
        try:
            yield daemon, leader
        finally:
            daemon.terminate()


def test_a_terminal_that_hangs_up_ends_the_mount_in_its_foreground(user: Home, cid: str) -> None:
    with in_the_foreground(user, "plain") as (daemon, terminal):
        assert os.listdir(user.mountpoint) == [cid]
        os.close(terminal)
        assert daemon.wait(PATIENCE) == 0
        assert fuse_mounts(user.folder) == []


def test_a_mount_under_nohup_outlives_its_terminal(user: Home, cid: str) -> None:
    absent = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
    with in_the_foreground(user, "nohup") as (daemon, terminal):
        os.close(terminal)
        with pytest.raises(OSError, match="timed out"):
            os.stat(user.mountpoint / absent)  # this is logged, but standard error can't be written
        daemon.send_signal(signal.SIGHUP)
        assert user.json("status", "--json")["pid"] == daemon.pid
        assert os.listdir(user.mountpoint) == [cid]
    assert daemon.returncode == 0


def test_a_service_without_a_terminal_does_not_end_by_sighup(user: Home, cid: str) -> None:
    command = [sys.executable, "-m", "ipfsfuse", "mount", "--foreground", "--json", str(user.mountpoint)]
    with subprocess.Popen(
        command,
        env=user.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as daemon:
        assert daemon.stdout is not None
        assert json.loads(daemon.stdout.readline())["pid"] == daemon.pid
        daemon.send_signal(signal.SIGHUP)
        assert user.json("status", "--json")["pid"] == daemon.pid
        daemon.terminate()
    assert daemon.returncode == 0


def test_the_log_goes_on_in_a_new_file_after_sighup(user: Home, cid: str) -> None:
    with user.mounted() as mount:
        log = user.store / "log"
        log.rename(user.cache / "moved-away")
        os.kill(mount.pid, signal.SIGHUP)
        wait_until(log.exists, "a new log exists")
        wait_until(lambda: "opened anew" in log.read_text(), "the new log is written")
        assert os.readlink(f"/proc/{mount.pid}/fd/2") == str(log)


def one_more_line(mount: Mounted) -> int:
    """Makes the daemon log a line. Returns the size of its log after that."""
    before = os.stat(f"/proc/{mount.pid}/fd/2").st_size
    os.kill(mount.pid, signal.SIGUSR1)
    for _ in range(1000):
        if (size := os.stat(f"/proc/{mount.pid}/fd/2").st_size) != before:
            break
        time.sleep(0.001)
    return size


def test_the_log_and_the_one_before_it_stay_small(user: Home, cid: str) -> None:
    with user.mounted("--budget", "256KiB") as mount:
        log, older = user.store / "log", user.store / "log.1"
        wait_until(lambda: one_more_line(mount) and older.exists(), "the log was put aside")
        reads(mount, cid)
        for path in (log, older):
            assert path.stat().st_size < (256 << 10) // 32 + 1000
        assert {os.readlink(f"/proc/{mount.pid}/fd/{number}") for number in (1, 2)} == {str(log)}


def test_a_log_that_was_moved_away_loses_nothing_before_sighup(user: Home, cid: str) -> None:
    with user.mounted("--budget", "256KiB") as mount:
        log, moved = user.store / "log", user.cache / "moved-away"
        before = log.read_text()
        log.rename(moved)  # a program that rotates logs has not sent SIGHUP yet
        wait_until(lambda: one_more_line(mount) and log.exists(), "a new log was begun at the limit")
        assert moved.read_text().startswith(before)
        assert "status: up" in moved.read_text()


def test_a_log_whose_folder_is_gone_is_bounded_too(user: Home, cid: str) -> None:
    with user.mounted("--budget", "256KiB") as mount:
        (user.store / "log").unlink()
        user.cache.rename(user.folder / "elsewhere")
        sizes = [one_more_line(mount)]
        wait_until(lambda: sizes.append(one_more_line(mount)) or sizes[-1] < sizes[-2], "the log began again")
        reads(mount, cid)
        assert max(sizes) < (256 << 10) // 32 + 1000


ENDED_EARLY = """
import os, signal, sys
import trio
from ipfsfuse.cli.main import main
from ipfsfuse.fuse.device import Device

async def initialized(self):
    await trio.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    await trio.sleep(5)
    return True

Device.initialized = initialized
sys.exit(main(sys.argv[1:]))
"""


def test_a_mount_that_is_ended_before_it_answers_ends_cleanly(user: Home) -> None:
    command = [sys.executable, "-c", ENDED_EARLY, "mount", "--foreground", str(user.mountpoint)]
    done = subprocess.run(command, env=user.env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "unmounted" in done.stderr
    assert "mounted at" not in done.stderr
    assert not fuse_mounts(user.folder)


ENDED_BEFORE_ITS_RECEIVER = """
import os, signal, sys
import trio
from ipfsfuse.cli.main import main

opened = trio.open_signal_receiver

def open_signal_receiver(*numbers):
    os.kill(os.getpid(), signal.SIGTERM)
    return opened(*numbers)

trio.open_signal_receiver = open_signal_receiver
sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_that_comes_as_the_receiver_is_made_is_not_lost(user: Home) -> None:
    command = [sys.executable, "-c", ENDED_BEFORE_ITS_RECEIVER, "mount", "--foreground", str(user.mountpoint)]
    with subprocess.Popen(command, env=user.env, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            _out, err = daemon.communicate(timeout=PATIENCE)
        finally:
            daemon.kill()
    assert daemon.returncode == 0, err
    assert "SIGTERM: unmounting" in err
    assert not fuse_mounts(user.folder)


def test_further_signals_change_nothing_in_the_foreground(user: Home, cid: str) -> None:
    """An open file keeps the mount for half a second after the first signal."""
    command = [sys.executable, "-m", "ipfsfuse", "mount", "--foreground", "--json", str(user.mountpoint)]
    with subprocess.Popen(
        command, env=user.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        assert json.loads(daemon.stdout.readline())["pid"] == daemon.pid
        file = os.open(user.mountpoint / cid / "hello.txt", os.O_RDONLY)
        daemon.send_signal(signal.SIGQUIT)
        while daemon.poll() is None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGXCPU):
                daemon.send_signal(number)
            time.sleep(0.01)
        _out, err = daemon.communicate(timeout=PATIENCE)
        with suppress(OSError):
            os.close(file)
    assert daemon.returncode == 0, err
    assert not fuse_mounts(user.folder)


def test_a_mount_that_is_unmounted_while_a_request_is_read_ends_cleanly(user: Home) -> None:
    library = user.folder / "aborted_read.so"
    source = Path(__file__).parents[1] / "fuse" / "aborted_read.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-o", library, source, "-ldl"], check=True)
    command = [sys.executable, "-m", "ipfsfuse", "mount", "--foreground", "--json", str(user.mountpoint)]
    preloaded = ":".join(filter(None, (str(library), os.environ.get("LD_PRELOAD"))))
    with subprocess.Popen(
        command,
        env=user.env | {"LD_PRELOAD": preloaded},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as daemon:
        assert daemon.stdout is not None
        assert json.loads(daemon.stdout.readline())["pid"] == daemon.pid
        daemon.send_signal(signal.SIGQUIT)
        _out, err = daemon.communicate(timeout=PATIENCE)
    assert daemon.returncode == 0, err
    assert not fuse_mounts(user.folder)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_mount_needs_no_standard_streams(user: Home, cid: str, closed: str) -> None:
    command = [sys.executable, "-m", "ipfsfuse", "mount", str(user.mountpoint)]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    assert subprocess.run(shell, env=user.env, timeout=PATIENCE).returncode == 0
    try:
        assert (user.mountpoint / cid / "hello.txt").read_text() == "hello\n"
    finally:
        user.run("unmount", user.mountpoint)


def test_messages_to_a_closed_standard_error_go_nowhere_else(user: Home) -> None:
    command = [sys.executable, "-m", "ipfsfuse", "status", "--json"]
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    done = subprocess.run(shell, env=user.env, stdout=subprocess.PIPE, timeout=PATIENCE)
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == 1
