"""Where a guest may write: /tmp, which is its own, bounded, and removed at the end; and /out, the folder of
its results. Also the directory that is its `/`."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from ipfsfuse_run import host_folders
from ipfsfuse_run.errors import TRAPPED
from tests.mounting import (
    NOBODY,
    PATIENCE,
    Home,
    alive,
    command_of,
    open_device,
    pass_with_open_device,
    wait_until,
)
from tests.runner.conftest import Runner, lines, with_command

NO_TMPFS = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 430), (6, 0, 0, 0x00050001), (6, 0, 0, 0x7FFF0000)]
held = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in code))
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(code), ctypes.cast(held, ctypes.c_void_p))), 0, 0) == 0
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Runs Python with fsopen(2) refused, as in a container without privileges."""


class WithoutTmpfs(Runner):
    def command(self, *args: str | Path) -> list[str]:
        python, *rest = super().command(*args)
        return [python, "-c", NO_TMPFS, *rest]


@pytest.fixture(params=["tmpfs", "folder"])
def run_with_each_tmp(run: Runner, request: pytest.FixtureRequest) -> Runner:
    """A runner for each kind of /tmp: a tmpfs, and a folder."""
    return run if request.param == "tmpfs" else WithoutTmpfs(run.env, run.mount)


def leftovers(run: Runner) -> Sequence[Path]:
    """The folders that are left of any guest's /tmp."""
    return list(Path(run.env["XDG_CACHE_HOME"], "ipfsfuse-run").glob("tmp/*"))


def test_tmp_is_empty_writable_and_gone_at_the_end(run_with_each_tmp: Runner, habits: Path) -> None:
    for _ in range(2):
        assert run_with_each_tmp(habits, "ls", "/tmp").stdout == b""
        assert run_with_each_tmp(habits, "fill", "/tmp/file", "100000").returncode == 0
        assert leftovers(run_with_each_tmp) == []
    assert "tmp" in lines(run_with_each_tmp(habits, "ls", "/").stdout)


def test_tmp_can_be_the_working_folder(run_with_each_tmp: Runner, habits: Path) -> None:
    done = run_with_each_tmp("--cwd", "/tmp", habits, "write", "file")
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_tmpfs_refuses_more(run: Runner, habits: Path) -> None:
    if not host_folders.tmpfs_is_offered():
        pytest.skip("this user can't mount a tmpfs on this machine")
    assert run("--tmp", "1MiB", habits, "fill", "/tmp/file", "1000000").returncode == 0
    assert run("--tmp", "1MiB", habits, "fill", "/tmp/file", "2000000").returncode == 1
    assert run("--tmp", "1MiB", habits, "names", "/tmp").returncode == 1
    assert run(habits, "fill", "/tmp/file", str(257 << 20)).returncode == 1


def test_a_folder_for_tmp_is_bounded_too(run: Runner, habits: Path) -> None:
    run_without_tmpfs = WithoutTmpfs(run.env, run.mount)
    for args in (["fill", "/tmp/file", "2000000"], ["fills", "/tmp"], ["names", "/tmp"], ["folders", "/tmp"]):
        done = run_without_tmpfs("--tmp", "1MiB", "-W", "timeout=20s", habits, *args)
        assert (done.returncode, len(lines(done.stderr))) == (TRAPPED, 1), (args, done)
        assert b"--tmp 1048576 bytes" in done.stderr
        assert leftovers(run_without_tmpfs) == []


def test_tmp_can_be_left_out_or_be_another_folder(run: Runner, habits: Path, tmp_path: Path) -> None:
    done = run("--tmp", "0", habits, "ls", "/")
    assert (done.returncode, done.stdout) == (0, b"ipfs\n")
    given = tmp_path / "given"
    given.mkdir()
    assert run("--dir", f"{given}::/tmp", habits, "write", "/tmp/file").returncode == 0
    assert (given / "file").read_text() == "written\n"
    done = run("--tmp", "1MiB", "--dir", f"{given}::/tmp", habits, "args")
    assert (done.returncode, len(lines(done.stderr))) == (2, 1)
    for wrong in ("x", "-1", "1e30"):
        done = run("--tmp", wrong, habits, "args")
        assert (done.returncode, len(lines(done.stderr))) == (2, 1)


@pytest.mark.parametrize("victim", ["runner", "guest"])
def test_nothing_of_tmp_is_left_after_a_kill(run_with_each_tmp: Runner, habits: Path, victim: str) -> None:
    name = f"/tmp/{uuid.uuid4()}"
    process = run_with_each_tmp.start(habits, "fill-then-sleep", name, "1000000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"sleeping\n"
    assert len(leftovers(run_with_each_tmp)) == isinstance(run_with_each_tmp, WithoutTmpfs)
    assert not Path(name).exists()
    with open(f"/proc/{process.pid}/task/{process.pid}/children", encoding="ascii") as file:
        guest = int(file.read().split()[0])
    os.kill(process.pid if victim == "runner" else guest, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    wait_until(lambda: not leftovers(run_with_each_tmp), "the folder is removed")
    wait_until(lambda: not alive(guest), "the guest is gone")


class AsNobody(Runner):
    def command(self, *args: str | Path) -> list[str]:
        return [*command_of(NOBODY), *super().command(*args)]


@pytest.mark.fuse
@open_device
@pytest.mark.parametrize("engine", ["library", "command"])
def test_an_ordinary_user_has_a_tmpfs_and_sees_the_mount(
    tmp_path: Path, habits: Path, wasmtime: Path, engine: str
) -> None:
    """The guest's process has its own user namespace. For the mount, it must still be this user."""
    home = Home(tmp_path / "home")
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    (tmp_path / "source").write_text("content\n")
    for path in (tmp_path, home.folder, home.mountpoint):
        os.chown(path, NOBODY, NOBODY)
    user = AsNobody(with_command(home.env, tmp_path, wasmtime))
    add = [*command_of(NOBODY), sys.executable, "-m", "ipfsfuse", "add", "-Q", tmp_path / "source"]
    cid = subprocess.run(add, env=home.env, capture_output=True, text=True, check=True).stdout.strip()
    run = partial(user, "--isolated", "--engine", engine, habits)
    assert run("cat", f"/ipfs/{cid}").stdout == b"content\n"
    assert run("fill", "/tmp/file", "1000000").returncode == 0
    command = [*command_of(NOBODY), sys.executable, "-c", IS_OFFERED]
    if subprocess.run(command, env=home.env, check=False).returncode == 0:
        assert run("fill", "/tmp/file", str(257 << 20)).returncode == 1


@pytest.mark.fuse
def test_an_ordinary_user_runs_a_guest_with_a_device_that_is_open_to_all() -> None:
    pass_with_open_device(__file__)


IS_OFFERED = "from ipfsfuse_run import host_folders; raise SystemExit(not host_folders.tmpfs_is_offered())"


def test_folders_nested_too_deeply_for_a_path_are_removed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    folder = os.open(top, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("n" * 200, dir_fd=folder)
        below = os.open("n" * 200, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    (top / "link").symlink_to(tmp_path)
    (top / "locked").mkdir(mode=0)
    host_folders.remove_tree(str(top))
    assert list(tmp_path.iterdir()) == []


# -- the folder of results, and the root ---------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["library", "command"])
@pytest.mark.fuse
def test_results_are_written_to_the_folder(
    home: Home, tmp_path: Path, habits: Path, wasmtime: Path, engine: str
) -> None:
    run = Runner(with_command(home.env, tmp_path, wasmtime))
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        out = tmp_path / name
        done = run("--offline", "--engine", engine, "--out", out, habits, "write", "/out/result")
        assert (done.returncode, done.stderr) == (0, b"")
        assert (out / "result").read_text() == "written\n"
        assert run("--offline", "--out", tmp_path / f"b{name}", habits, "ls", "/out").stdout == b""


def test_an_unusable_folder_for_results_is_refused(run: Runner, tmp_path: Path, habits: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "given").mkdir()
    cases: list[tuple[list[str | Path], int]] = [
        (["--out", tmp_path / "full"], 2),
        (["--out", tmp_path / "file"], 125),
        (["--out", tmp_path / "none" / "of" / "these"], 125),
        (["--out", tmp_path / "new", "--dir", f"{tmp_path / 'given'}::/out/x"], 2),
    ]
    for options, code in cases:
        done = run(*options, habits, "write", "/out/result")
        assert (done.returncode, len(lines(done.stderr))) == (code, 1), done
    assert [each.name for each in (tmp_path / "full").iterdir()] == ["file"]
    done = run("--out", tmp_path / "new", tmp_path / "no-guest", "args")
    assert done.returncode == 125
    assert not (tmp_path / "new").exists(), "a run that did not begin leaves no folder"


def test_results_are_bounded(run: Runner, tmp_path: Path, habits: Path) -> None:
    for number, args in enumerate((["fill", "/out/a", "2000000"], ["fills", "/out"], ["names", "/out"])):
        done = run("--out", tmp_path / f"{number}", "-W", "max-out=1MiB,timeout=20s", habits, *args)
        assert (done.returncode, len(lines(done.stderr))) == (TRAPPED, 1), done
        assert b"max-out=1048576 bytes" in done.stderr


@pytest.mark.fuse
@pytest.mark.parametrize("engine", ["library", "command"])
def test_the_root_is_a_directory_of_the_mount(
    home: Home, tmp_path: Path, habits: Path, wasmtime: Path, engine: str
) -> None:
    source = tmp_path / "source"
    (source / "image" / "etc").mkdir(parents=True)
    (source / "image" / "etc" / "motd").write_text("welcome\n")
    (source / "image" / "absolute").symlink_to("/etc/motd")
    (source / "outside").write_text("not for the guest\n")
    cid = home.add(source)
    base = Runner(with_command(home.env, tmp_path, wasmtime))
    with home.mounted() as mount:
        base.mount = mount.path
        run = partial(base, "--engine", engine, "--out", tmp_path / "out", "--root", f"{cid}/image", habits)
        assert run("cat", "/etc/motd").stdout == b"welcome\n"
        assert sorted(lines(run("ls", "/").stdout)) == ["absolute", "etc"]
        assert run("ls", f"/ipfs/{cid}").stdout == b"image\noutside\n"
        for refused in ("/absolute", "/../outside", "/etc/../../outside"):
            assert run("cat", refused).stdout == b""
        assert run("fill", "/etc/new", "1").returncode == 1
        assert run("fill", "/tmp/new", "1").returncode == 0
        assert run("write", "/out/new").returncode == 0
        for root in ("", "/", f"{cid}/none", f"{cid}/outside", f"{cid}/../../.."):
            done = base("--root", root, habits, "ls", "/")
            assert (done.returncode, done.stdout, len(lines(done.stderr))) == (
                2 if root in ("", "/") else 125,
                b"",
                1,
            ), done
        assert (
            base("--root", f"/ipfs/{cid}/image", "--cwd", "/etc", habits, "cat", "motd").stdout
            == b"welcome\n"
        )
