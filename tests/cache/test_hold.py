"""One daemon per cache folder, and folders for one guest's life."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ipfsfuse.cache.store import hold, isolated
from ipfsfuse.errors import StoreFailed

HOLDER = """
import sys, pathlib
from ipfsfuse.cache.store import hold, isolated
if sys.argv[1] == "isolated":
    context = isolated.isolated_folder(pathlib.Path(sys.argv[2]))
else:
    context = hold.hold(pathlib.Path(sys.argv[2]))
with context as held:
    if sys.argv[1] == "announced":
        held.announce(12345, "/mnt/there")
    print(held if sys.argv[1] == "isolated" else "held", flush=True)
    sys.stdin.read()
"""


def holder(kind: str, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that holds `folder`, and what it said: wait until it does."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, kind, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen[str], by: signal.Signals | None = None) -> None:
    if by is not None:
        process.send_signal(by)
    process.communicate()


def test_a_second_daemon_is_refused_with_the_first_ones_pid_and_mountpoint(tmp_path: Path) -> None:
    first, _said = holder("announced", tmp_path / "cache")
    try:
        with pytest.raises(StoreFailed, match="process 12345, mounted at /mnt/there"), hold.hold(tmp_path / "cache"):
            pass
        assert not hold.is_free(tmp_path / "cache")
    finally:
        end(first)
    with hold.hold(tmp_path / "cache"):
        assert hold.announced(tmp_path / "cache") is None


def test_one_that_has_not_announced_itself_is_refused_too(tmp_path: Path) -> None:
    first, _said = holder("held", tmp_path / "cache")
    try:
        with pytest.raises(StoreFailed, match="in use by another daemon"), hold.hold(tmp_path / "cache"):
            pass
    finally:
        end(first)


def test_kill_9_lets_go(tmp_path: Path) -> None:
    first, _said = holder("announced", tmp_path / "cache")
    end(first, signal.SIGKILL)
    assert hold.announced(tmp_path / "cache") == (12345, "/mnt/there")
    with hold.hold(tmp_path / "cache"):
        assert hold.announced(tmp_path / "cache") is None


def test_the_folder_is_made_for_us_alone(tmp_path: Path) -> None:
    with hold.hold(tmp_path / "a" / "cache"):
        assert (tmp_path / "a" / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(StoreFailed, match="may be written by others: run chmod 700"), hold.hold(folder):
        pass


def test_a_folder_that_others_own_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a folder away needs root")
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(StoreFailed, match="belongs to another user"), hold.hold(folder):
        pass


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(StoreFailed, match="is no folder"), hold.hold(tmp_path / "cache"):
        pass


def test_an_isolated_folder_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    with isolated.isolated_folder(tmp_path) as one, isolated.isolated_folder(tmp_path) as two:
        assert one != two
        assert one.stat().st_mode & 0o777 == 0o700
        (one / "content").write_text("secret")
    assert not one.exists()
    assert not two.exists()


def test_what_kill_9_left_of_an_isolated_folder_is_swept_by_the_next_start(tmp_path: Path) -> None:
    killed, left = holder("isolated", tmp_path)
    living, used = holder("isolated", tmp_path)
    end(killed, signal.SIGKILL)
    assert Path(left).exists()
    try:
        with isolated.isolated_folder(tmp_path):
            assert not Path(left).exists()
            assert Path(used).exists()
    finally:
        end(living)
    assert not Path(used).exists()


def test_a_link_that_others_set_in_the_temporary_folder_leads_nowhere(tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    (home / "documents").mkdir(parents=True)
    temporary.mkdir()
    isolated.nest(temporary).symlink_to(home)
    with pytest.raises(StoreFailed, match="is no folder"), isolated.isolated_folder(temporary):
        pass
    assert (home / "documents").exists()


def test_what_can_not_be_looked_at_is_not_taken_for_free(tmp_path: Path) -> None:
    assert hold.is_free(tmp_path)
    (tmp_path / "lock").symlink_to("lock")
    assert not hold.is_free(tmp_path)
