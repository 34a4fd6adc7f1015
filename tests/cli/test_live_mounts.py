"""`--mount` finds any live mount of this user's, whatever its cache folder, and `unmount` waits for its
daemon."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ipfsfuse.control import live_mounts
from tests.mounting import Home, alive, wait_until

pytestmark = pytest.mark.fuse


def pid_at(user: Home, point: Path, *options: str | Path) -> int:
    pid: int = user.json("status", "--json", "--mount", point, *options)["pid"]
    return pid


def test_a_second_and_an_isolated_mount_are_found(user: Home) -> None:
    second, isolated = user.folder / "second", user.folder / "isolated"
    with (
        user.mounted() as first,
        user.mounted("--cache-dir", user.folder / "c2", at=second) as other,
        user.mounted("--isolated", at=isolated) as alone,
    ):
        assert pid_at(user, user.mountpoint) == first.pid
        assert pid_at(user, second) == other.pid
        assert pid_at(user, isolated) == alone.pid
        assert user.json("ls", "--json", "--mount", isolated)["entries"] == []
        assert pid_at(user, second, "--cache-dir", user.folder / "c2") == other.pid
        user.refused_while_mounted(
            "status",
            "--mount",
            second,
            "--cache-dir",
            user.cache,
            names=f"is not at {second}: leave out --cache-dir",
        )
        user.run("unmount", isolated)
        assert not alive(alone.pid)
        assert len(os.listdir(user.runtime / "ipfsfuse")) == 2
    assert os.listdir(user.runtime / "ipfsfuse") == []


def test_a_daemon_that_was_started_with_other_variables_is_found(user: Home) -> None:
    user.env["XDG_RUNTIME_DIR"] = str(user.folder / "not there")
    with user.mounted() as mount:
        user.env["XDG_RUNTIME_DIR"] = str(user.runtime)
        assert pid_at(user, user.mountpoint) == mount.pid


def test_the_entry_of_a_killed_daemon_is_ignored(user: Home) -> None:
    with user.mounted("--isolated") as mount:
        (entry,) = (user.runtime / "ipfsfuse").iterdir()
        before = entry.read_text()
        os.kill(mount.pid, signal.SIGKILL)
        wait_until(lambda: not alive(mount.pid), "the daemon is dead")
        assert entry.read_text() == before
        subprocess.run(["fusermount3", "-u", "-z", user.mountpoint], check=False, capture_output=True)
    user.refused("status", "--mount", user.mountpoint, names=f"{user.mountpoint} is not a mount of ipfsfuse")
    with user.mounted() as mount:
        assert pid_at(user, user.mountpoint) == mount.pid


def test_a_busy_mount_that_is_ended_removes_its_entry(user: Home) -> None:
    with user.mounted() as mount:
        assert list((user.runtime / "ipfsfuse").iterdir())
        with subprocess.Popen(["sleep", "600"], cwd=mount.path) as busy:
            os.kill(mount.pid, signal.SIGTERM)
            wait_until(lambda: not alive(mount.pid), "the daemon is dead")
            busy.kill()
        assert not list((user.runtime / "ipfsfuse").iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 4000,
        b"{}",
        b"\xff",
        b'{"mountpoint": "/", "pid": 1e999, "control": "/"}',
        b'{"mountpoint": 1, "pid": "x", "control": []}',
        b"9" * 100_000,
        None,
    ],
)
def test_a_damaged_entry_is_ignored(user: Home, content: bytes | None) -> None:
    with user.mounted() as mount:
        (entry,) = (user.runtime / "ipfsfuse").iterdir()
        entry.unlink()
        if content is None:
            os.mkfifo(entry)
        else:
            entry.write_bytes(content)
        assert pid_at(user, user.mountpoint) == mount.pid  # found by its cache folder
    assert entry.exists()


def test_a_folder_that_others_may_enter_is_not_used(user: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = user.runtime / "ipfsfuse"
    folder.mkdir(mode=0o755)
    with user.mounted() as mount:
        assert os.listdir(folder) == []
        (folder / "0:1").write_text(json.dumps({"mountpoint": str(mount.path), "pid": 1, "control": "/x"}))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(user.runtime))
        found = live_mounts.find(mount.path)
        assert found is None or found.pid == mount.pid
    folder.chmod(0o700)
    (folder / "0:1").unlink()
    folder.rmdir()
    folder.symlink_to(user.folder)
    with user.mounted():
        assert not [name for name in os.listdir(user.folder) if ":" in name]


def test_a_mount_whose_daemon_is_stopped_is_found_without_asking_it(user: Home) -> None:
    script = f"from ipfsfuse.cli import folders; print(folders.control(folders.last_daemon(None, {str(user.mountpoint)!r})))"
    with user.mounted("--isolated") as mount:
        os.kill(mount.pid, signal.SIGSTOP)
        try:
            Path("/proc/sys/vm/drop_caches").write_text("2") if os.geteuid() == 0 else None
            done = subprocess.run(
                [sys.executable, "-c", script], env=user.env, capture_output=True, text=True, timeout=20
            )
        finally:
            os.kill(mount.pid, signal.SIGCONT)
        assert done.stdout == f"{mount.control}\n", done.stderr
