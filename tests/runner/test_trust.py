"""The runner trusts only a cache folder, a daemon and a mount of this user. It checks every name in its own
folder."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ipfsfuse_run.errors import GuestRefused
from ipfsfuse_run.sandbox import IPFS, Preopen, Sandbox, open_folders
from tests.mounting import NOBODY, Home
from tests.runner.conftest import DEMO, TOP, Done, Runner, lines

READER = DEMO / "reader-p1.wat"
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")

MNT_DETACH = 2

LISTEN = """
import json, os, socket, sys
path, user = sys.argv[1], int(sys.argv[2])
with socket.socket(socket.AF_UNIX) as server:
    server.bind(path)
    os.chmod(path, 0o600)
    os.setuid(user)
    server.listen()  # SO_PEERCRED gives the user whose process calls this
    print("listening", flush=True)
    while True:
        with server.accept()[0] as peer, peer.makefile("rwb") as lines:
            for line in lines:
                lines.write(json.dumps({"ok": True, "holders": 1, "offline": True, "sources": []}).encode() + b"\\n")
                lines.flush()
"""


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Runner:
    (tmp_path / "tmp").mkdir()
    return Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg"), "TMPDIR": str(tmp_path / "tmp")})


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A folder that an attacker wants a guest to get as /ipfs."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "file").write_text("evil\n")
    return evil


def daemon_folder(home: Home) -> Path:
    """The folder where a daemon of this home has its socket. A mount has made it."""
    with home.mounted() as mount:
        folder = mount.control.parent
    for each in ("daemon.json", "control"):
        (folder / each).unlink(missing_ok=True)
    return folder


@contextmanager
def fake_daemon(folder: Path, mountpoint: Path, user: int) -> Iterator[None]:
    """A fake daemon, which answers and names `mountpoint` as its own."""
    (folder / "daemon.json").write_text(json.dumps({"pid": os.getpid(), "mountpoint": str(mountpoint)}))
    command = [sys.executable, "-c", LISTEN, folder / "control", str(user)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"
        try:
            yield
        finally:
            server.kill()


def refused(done: Done, *names: str) -> None:
    message = done.stderr.decode()
    assert (done.returncode, done.stdout, message.count("\n")) == (125, b"", 1), done
    assert all(name in message for name in names), message


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Path]:
    """A mount of this user with another cache folder. Only the folder of its daemon shows the difference."""
    with Home(tmp_path / "second").mounted() as mount:
        yield mount.path


@pytest.mark.fuse
@AS_ROOT
def test_another_users_cache_folder_is_refused(run: Runner, home: Home, real: Path) -> None:
    folder = daemon_folder(home)
    with fake_daemon(folder, real, os.geteuid()):
        os.chown(folder, NOBODY, NOBODY)
        refused(run(READER, "/ipfs/file"), str(folder), "another user")


@pytest.mark.fuse
def test_a_cache_folder_that_others_may_write_is_refused(run: Runner, home: Home, real: Path) -> None:
    folder = daemon_folder(home)
    with fake_daemon(folder, real, os.geteuid()):
        folder.chmod(0o777)
        refused(run(READER, "/ipfs/file"), str(folder), "chmod 700")


@pytest.mark.fuse
def test_a_cache_folder_that_is_a_symlink_is_refused(
    run: Runner, home: Home, real: Path, tmp_path: Path
) -> None:
    folder = daemon_folder(home)
    with fake_daemon(folder, real, os.geteuid()):
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
        refused(run(READER, "/ipfs/file"), str(folder), "symlink")


@pytest.mark.fuse
@AS_ROOT
def test_a_daemon_of_another_user_is_refused(run: Runner, home: Home, evil: Path) -> None:
    with fake_daemon(daemon_folder(home), evil, NOBODY):
        refused(run(READER, "/ipfs/file"), "control", f"user {NOBODY}")


@pytest.mark.fuse
def test_a_mountpoint_without_a_mount_of_ours_is_refused(run: Runner, home: Home) -> None:
    with fake_daemon(daemon_folder(home), Path("/proc"), os.geteuid()):
        refused(run(READER, "/ipfs/version"), "/proc is not a mount of yours")


@pytest.mark.fuse
@AS_ROOT
@pytest.mark.parametrize(("kind", "user"), [("fuse.ipfsfuse", NOBODY), ("fuse.other", 0)])
def test_another_users_mount_is_refused(
    run: Runner, home: Home, tmp_path: Path, kind: str, user: int
) -> None:
    """The type proves nothing: any user can mount with this type by fusermount3."""
    mountpoint = tmp_path / "theirs"
    mountpoint.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={user},group_id={user}".encode()
    assert libc.mount(b"ipfsfuse", bytes(mountpoint), kind.encode(), 0, options) == 0, os.strerror(
        ctypes.get_errno()
    )
    try:
        with fake_daemon(daemon_folder(home), mountpoint, os.geteuid()):
            refused(run(READER, "/ipfs/x"), str(mountpoint), "not a mount of yours")
    finally:
        os.close(device)
        libc.umount2(bytes(mountpoint), MNT_DETACH)


@pytest.mark.fuse
def test_a_folder_that_is_not_mounted_is_never_given_to_a_guest(
    run: Runner, home: Home, evil: Path, tmp_path: Path
) -> None:
    """The daemon may be ending, or may be a fake. The runner makes its own mount."""
    (tmp_path / "source").write_text("content\n")
    cid = home.add(tmp_path / "source")
    (evil / cid).write_text("evil\n")
    with fake_daemon(daemon_folder(home), evil, os.geteuid()):
        done = run(READER, f"/ipfs/{cid}")
    assert (done.returncode, lines(done.stdout)[0]) == (0, "content"), done


def test_a_mount_that_was_replaced_after_the_check_is_not_given(tmp_path: Path) -> None:
    """A user who may rename folders above the mountpoint could put another folder there between the runner's
    check and the guest's start."""
    (tmp_path / "root").mkdir()
    numbers = {
        fields[4]: int(fields[0])
        for fields in map(str.split, Path("/proc/self/mountinfo").read_text().splitlines())
    }
    preopen = Preopen("/proc", IPFS, writable=False, mount_id=numbers["/proc"])
    right = Sandbox(["guest"], [], [preopen], None)
    wrong = right._replace(preopens=[right.preopens[0]._replace(host=str(tmp_path / "root"))])
    with pytest.raises(GuestRefused, match="not the mount any more"), open_folders(wrong):
        pass
    with open_folders(right) as folders:
        assert [each.guest for each in folders] == [IPFS]


# -- the runner's own folder ---------------------------------------------------------------------------------


def a_symlink(path: Path, outside: Path) -> None:
    path.symlink_to(outside / ("folder" if path.suffix == "" and "-" not in path.name else "file"))


def a_file(path: Path, _outside: Path) -> None:
    path.write_text("junk")


def a_pipe(path: Path, _outside: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix_socket:
        unix_socket.bind(str(outside / "socket"))
    (outside / "socket").rename(path)


def a_full_folder(path: Path, _outside: Path) -> None:
    (path / "deep").mkdir(parents=True)
    (path / "deep" / "file").write_text("theirs")


def an_open_folder(path: Path, _outside: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def folder_of_another_user(path: Path, _outside: Path) -> None:
    path.mkdir(mode=0o700)
    os.chown(path, NOBODY, NOBODY)


PLANTED = (a_symlink, a_file, a_pipe, a_socket, a_full_folder, an_open_folder, folder_of_another_user)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_files_that_are_planted_in_the_runners_folder_do_no_harm(
    tmp_path: Path, tree: Path, habits: Path, plant: Callable[[Path, Path], None]
) -> None:
    """For each name that the runner uses there, the run succeeds or is refused in one line. Nothing outside
    is changed."""
    if plant is folder_of_another_user and os.geteuid() != 0:
        pytest.skip("only root can make files of another user")
    xdg, outside = tmp_path / "xdg", tmp_path / "outside-of-it"
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("untouched")
    run = Runner({**os.environ, "XDG_CACHE_HOME": str(xdg), "PYTHONPATH": str(TOP)}, tree)
    assert run(habits, "args").returncode == 0
    top = xdg / "ipfsfuse-run"
    (code,) = (top / "code").iterdir()
    names = [
        top,
        *(each for each in top.rglob("*")),
        code.with_name(f"{code.name}.part"),
        top / "code" / "stray",
    ]
    shutil.move(xdg, tmp_path / "good")
    before = snapshot(outside)
    for name in names:
        shutil.rmtree(xdg, ignore_errors=True)
        shutil.copytree(tmp_path / "good", xdg, copy_function=shutil.copy2)
        if name.is_dir():
            shutil.rmtree(name)
        else:
            name.unlink(missing_ok=True)
        plant(name, outside)
        done = run(habits, "args")
        if done.returncode == 0:
            assert (lines(done.stdout), done.stderr) == (["habits.wasm", "args"], b""), (name, done)
        else:
            refused(done, str(name))
        assert snapshot(outside) == before
        assert os.path.lexists(name)


def test_folders_of_an_earlier_version_are_used(
    tmp_path: Path, run: Runner, tree: Path, habits: Path
) -> None:
    """Earlier versions made the folders for a guest's `/` with mode 0755."""
    run.mount = tree
    assert run(habits, "args").returncode == 0
    (folder,) = (tmp_path / "xdg" / "ipfsfuse-run" / "roots").glob("*/ipfs")
    folder.chmod(0o755)
    assert run(habits, "args").returncode == 0


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(each): (each.lstat().st_mode, each.read_bytes() if each.is_file() else b"")
        for each in sorted(folder.rglob("*"))
    }


def test_the_code_cache_leaves_unknown_files_alone(tmp_path: Path, tree: Path, habits: Path) -> None:
    from ipfsfuse_run.code_cache import MODULE, CodeCache
    from ipfsfuse_run.guest import Settings, build, key, make_engine

    folder = tmp_path / "code"
    folder.mkdir(mode=0o700)
    for name in ("notes.txt", "a" * 64, f"{'b' * 64}-{'c' * 16}"):
        (folder / name).write_bytes(bytes(1000))
    settings = Settings(fuel=False, max_wasm_stack=None, deterministic=False)
    code, engine = b"\0asm\1\0\0\0", make_engine(settings)
    entry = CodeCache(folder, bound=1).compiled(
        MODULE, code, "guest", 1 << 32, key(settings), lambda: build(engine, MODULE, code, "guest")
    )
    os.close(entry.file)
    names = {each.name for each in folder.iterdir()}
    assert {"notes.txt", "a" * 64} < names
    assert f"{'b' * 64}-{'c' * 16}" not in names
    assert len(names) == 3
