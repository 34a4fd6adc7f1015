"""The commands on a real mount, as a user types them."""

import json
import os
import pty
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ipfsfuse.cache.store.folder import lock_folder
from ipfsfuse.dag import cid as cids
from tests.cache.test_budget import own_filesystem
from tests.mounting import Home, Mounted, alive, fuse_mounts, wait_until

pytestmark = pytest.mark.fuse


@pytest.fixture
def cid(user: Home) -> str:
    source = user.folder / "source"
    (source / "sub").mkdir(parents=True)
    (source / "hello.txt").write_text("hello\n")
    (source / "sub" / "big").write_bytes(os.urandom(300_000))
    return user.add(source)


@pytest.fixture
def car(user: Home, cid: str) -> Path:
    """The same content in a CAR file: a mount reads it in place."""
    user.run("export", cid, user.folder / "x.car")
    return user.folder / "x.car"


@pytest.fixture
def mounted(user: Home, cid: str) -> Iterator[Mounted]:
    with user.mounted() as mount:
        yield mount


def test_mount_returns_when_the_mount_answers(user: Home, cid: str) -> None:
    assert user.run("mount", user.mountpoint).stdout == ""
    assert os.listdir(user.mountpoint) == [cid]
    assert (user.mountpoint / cid / "hello.txt").read_text() == "hello\n"
    assert user.run("unmount", user.mountpoint).stderr == ""
    assert os.listdir(user.mountpoint) == []


def test_unmount_waits_for_the_daemon_and_the_next_mount_works_at_once(user: Home, cid: str) -> None:
    for _ in range(2):
        made = user.json("mount", "--json", user.mountpoint)
        user.run("unmount", user.mountpoint)
        assert not alive(made["pid"])
        assert not fuse_mounts(user.folder)


def test_a_mount_right_after_fusermount3(user: Home, cid: str) -> None:
    for _ in range(2):
        user.run("mount", user.mountpoint)
        subprocess.run(["fusermount3", "-u", user.mountpoint], check=True)
    user.run("mount", user.mountpoint)
    user.run("unmount", user.mountpoint)


def test_the_daemon_is_detached_from_the_process_that_started_it(mounted: Mounted) -> None:
    assert os.readlink(f"/proc/{mounted.pid}/cwd") == "/"
    assert os.getsid(mounted.pid) == mounted.pid
    assert os.readlink(f"/proc/{mounted.pid}/fd/0") == "/dev/null"
    log = mounted.control.parent / "log"
    assert {os.readlink(f"/proc/{mounted.pid}/fd/{number}") for number in (1, 2)} == {str(log)}
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert f"mounted at {mounted.path}" in log.read_text()
    assert stat.S_IMODE(mounted.control.stat().st_mode) == 0o600
    assert stat.S_IMODE(mounted.control.parent.stat().st_mode) == 0o700


def test_a_long_log_is_put_aside(user: Home, cid: str) -> None:
    with lock_folder(user.cache):
        pass
    (user.store / "log").write_bytes(b"x\n" * 600_000)
    with user.mounted() as mount:
        assert (user.store / "log.1").stat().st_size == 1_200_000
        assert mount.log().count("x\n") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU])
def test_a_signal_ends_a_mount_in_the_foreground_cleanly(
    user: Home, cid: str, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "ipfsfuse", "mount", "--foreground", "--json", str(user.mountpoint)]
    with subprocess.Popen(
        command, env=user.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        assert json.loads(daemon.stdout.readline())["pid"] == daemon.pid
        assert os.listdir(user.mountpoint) == [cid]
        daemon.send_signal(number)
        _out, err = daemon.communicate(timeout=60)
    assert daemon.returncode == 0, err
    assert f"{number.name}: unmounting" in err
    assert not fuse_mounts(user.folder)
    assert not (user.store / "control").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_mount_command_that_is_ended_early_leaves_no_daemon(user: Home, number: signal.Signals) -> None:
    os.mkfifo(user.folder / "never.car")  # opening it waits for a writer
    command = [sys.executable, "-m", "ipfsfuse", "mount", "--from", "never.car", str(user.mountpoint)]
    with subprocess.Popen(command, env=user.env, cwd=user.folder, stderr=subprocess.PIPE, text=True) as mount:
        wait_until(lambda: _daemons(mount.pid), "the daemon was started")
        (daemon,) = _daemons(mount.pid)
        mount.send_signal(number)
        assert mount.communicate(timeout=60)[1] == ""
    assert mount.returncode == (130 if number == signal.SIGINT else -number)
    wait_until(lambda: not alive(daemon), "the daemon has ended too")
    assert not fuse_mounts(user.folder)


def _daemons(pid: int) -> list[int]:
    """The children of a process that are daemons. While it imports modules, it may have other children."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):  # it has ended
            if b"--ready-fd" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def test_unmount_names_the_process_that_holds_a_busy_mount(user: Home, mounted: Mounted, cid: str) -> None:
    file = mounted.path / cid / "hello.txt"
    script = "import sys; held = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        ran = user.run("unmount", mounted.path, check=False)
        assert ran.returncode == 1
        assert ran.stderr.startswith(f"ipfsfuse: {mounted.path} is busy: {holder.pid} ({sys.executable} -c ")
        assert ran.stderr.endswith(f"uses {file}: end that first, or unmount with --lazy\n")
        assert os.listdir(mounted.path) == [cid]
        user.run("unmount", "--lazy", mounted.path)
        assert not fuse_mounts(user.folder)
        holder.kill()


def test_unmount_from_inside_the_mount(user: Home, mounted: Mounted, cid: str) -> None:
    ran = user.run("unmount", "..", check=False, cwd=mounted.path / cid)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_status(user: Home, mounted: Mounted, cid: str) -> None:
    shown = user.run("status").stdout
    assert f"mountpoint: {mounted.path}\n" in shown
    assert f"pid: {mounted.pid}\n" in shown
    assert "budget: 10.0 GiB" in shown
    assert user.json("status", "--json")["pid"] == mounted.pid
    assert user.json("status", "--json", "--mount", mounted.path)["pid"] == mounted.pid
    ran = user.run("status", "--mount", user.folder, check=False)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)


def test_a_mount_names_its_sources_and_says_when_none_could_be_asked(user: Home, cid: str) -> None:
    """It names its sources in one line when it is mounted. After a read for which it had no source to ask, it
    says so in the log and in `status`."""
    node = user.folder / "no-node"
    ran = user.run("mount", user.mountpoint)
    assert ran.stderr == (
        f"ipfsfuse: blocks come from library alone: there is no Kubo node at {node}, and no gateway is "
        "configured; name other sources with --from\n"
    )
    assert user.json("status", "--json")["no_source_to_ask"] == ""
    with pytest.raises(OSError, match="timed out"):
        (user.mountpoint / cids.text(cids.make(cids.RAW, b"\x12\x20" + bytes(32)))).stat()
    message = (
        "no source could be asked for a block that is not here: the sources are library; "
        "name others with --from"
    )
    assert user.json("status", "--json")["no_source_to_ask"].startswith(message)
    assert message in user.run("status").stdout
    assert message in (user.cache / "ipfsfuse-cache" / "log").read_text()
    user.run("unmount", user.mountpoint)


def test_an_offline_mount_names_a_remote_node_that_it_does_not_ask(user: Home) -> None:
    node = user.folder / "no-node"
    node.mkdir()
    (node / "api").write_text("/ip4/192.0.2.1/tcp/5001\n")
    ran = user.run("mount", "--offline", "--from", "kubo", user.mountpoint)
    user.run("unmount", user.mountpoint)
    assert "--offline: http://192.0.2.1:5001 is not asked" in ran.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="/etc/fuse.conf may not let ordinary users use --allow-other")
def test_allow_other_gives_a_warning_of_what_other_users_can_read(user: Home, cid: str) -> None:
    ran = user.run("mount", "--allow-other", "--json", user.mountpoint)
    made = json.loads(ran.stdout)
    mount = Mounted(Path(made["mountpoint"]), made["pid"], Path(made["control"]), user)
    assert ran.stderr.startswith("ipfsfuse: --allow-other: every user of this machine can read ")
    assert ran.stderr.count("\n") == 1
    assert "the whole library" in mount.log()
    user.unmount(mount)


def test_add_and_rm_are_seen_at_once(user: Home, mounted: Mounted, cid: str) -> None:
    (user.folder / "more").write_text("more\n")
    more = user.add(user.folder / "more")
    assert sorted(os.listdir(mounted.path)) == sorted([cid, more])
    assert [entry["cid"] for entry in user.json("library", "--json")] == [cid, more]
    assert user.run("rm", more).stdout == f"removed {more} more\n"
    assert os.listdir(mounted.path) == [cid]


def test_doctor_names_the_daemon_of_the_mount(user: Home, mounted: Mounted) -> None:
    assert f"process {mounted.pid} serves {mounted.path}" in user.run("doctor").stdout
    assert {finding["state"] for finding in user.json("doctor", "--json")} <= {"ok", "note"}


def test_doctor_asks_the_sources_it_is_given(user: Home, car: Path) -> None:
    with socket.socket() as taken:  # no process listens at this port
        taken.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
        ran = user.run(
            "doctor",
            "--json",
            "--from",
            car,
            "--from",
            "library",
            "--from",
            closed,
            "--from",
            "x://y",
            check=False,
        )
    states = {finding["about"]: finding["state"] for finding in json.loads(ran.stdout)}
    with_password = user.run("doctor", "--from", "https://me:secret@127.0.0.1:1/", check=False)
    assert "https://127.0.0.1:1/: " in with_password.stdout
    assert "secret" not in with_password.stdout + with_password.stderr
    assert ran.returncode == 1
    assert (states[str(car)], states[closed], states["x://y"]) == ("ok", "bad", "bad")


def test_prefetch_ls_evict_pin_and_fsck(user: Home, mounted: Mounted, cid: str) -> None:
    fetched = user.json("prefetch", "--json", f"/ipfs/{cid}")
    assert (fetched["files"], fetched["bytes"]) == (2, 300_006)
    assert user.run("ls").returncode == 0
    pinned = user.json("pin", "--json", cid)
    assert (pinned["pinned"], pinned["files"]) == (cid, 2)
    assert user.json("unpin", "--json", cid) == {"unpinned": cid}
    assert user.json("evict", "--all", "--json")["freed"] >= 0
    assert user.run("fsck").returncode == 0


def test_a_pin_of_content_that_is_read_in_place_is_whole_after_a_restart(
    user: Home, cid: str, car: Path
) -> None:
    with user.mounted("--from", car):
        user.run("pin", cid)
    with user.mounted("--from", car) as mount:
        assert mount.status()["cache"]["pinned_lost"] == 0
        assert " are not in the cache any more" not in mount.log()


def test_export_from_a_car_and_back(user: Home, cid: str, car: Path) -> None:
    user.run("rm", cid)
    with user.mounted("--from", car) as mount:
        assert (mount.path / cid / "hello.txt").read_text() == "hello\n"
        user.run("export", "--v2", "--from", car, cid, user.folder / "y.car")
        user.run("export", cid, user.folder / "z.car")  # from the running mount
    assert (user.folder / "z.car").read_bytes() == car.read_bytes()
    with user.mounted("--from", user.folder / "y.car", "--offline") as mount:
        assert (mount.path / cid / "hello.txt").read_text() == "hello\n"


def test_doctor_says_how_the_disk_limits_the_budget(user: Home) -> None:
    with own_filesystem(user.cache, 30 << 20) as folder:
        folder.chmod(0o700)
        ran = user.run("doctor", "--reserve", "10MiB")
        line = next(line for line in ran.stdout.splitlines() if "space: " in line)
        assert re.match(
            r"note space: the budget of 10.0 GiB is cut to (19|20)\.\d MiB: [23]\d\.\d MiB free there, "
            r"10\.0 MiB of it",
            line,
        )
        assert "ok   space: a budget of 1.0 MiB fits: " in user.run("doctor", "--budget", "1MiB").stdout
        (folder / "of somebody else").write_bytes(bytes(12 << 20))
        assert re.search(r"is cut to [78]\.\d MiB: ", user.run("doctor", "--reserve", "10MiB").stdout)


# -- export to standard output -------------------------------------------------------------------------------


def test_export_to_standard_output(user: Home, cid: str, car: Path) -> None:
    command = [sys.executable, "-m", "ipfsfuse", "export", cid, "-"]
    piped = subprocess.run(command, env=user.env, capture_output=True, timeout=60, cwd=user.folder)
    assert (piped.returncode, piped.stderr) == (0, b"")
    assert piped.stdout == car.read_bytes()
    with open(user.folder / "y.car", "wb") as out:
        assert subprocess.run(command, env=user.env, stdout=out, timeout=60, cwd=user.folder).returncode == 0
    assert (user.folder / "y.car").read_bytes() == car.read_bytes()
    assert not (user.folder / "-").exists()
    user.refused("export", cid, "-", "--v2", names="--v2 needs a file", code=2)


def test_export_does_not_write_a_car_to_a_terminal(user: Home, cid: str) -> None:
    leader, follower = pty.openpty()
    try:
        command = [sys.executable, "-m", "ipfsfuse", "export", cid, "-"]
        ran = subprocess.run(
            command, env=user.env, stdout=follower, stderr=subprocess.PIPE, text=True, timeout=60
        )
    finally:
        os.close(follower)
        os.close(leader)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert "not for a terminal" in ran.stderr


def test_a_reader_that_closes_the_pipe_or_a_signal_ends_an_export(user: Home) -> None:
    (user.folder / "large").write_bytes(os.urandom(5_000_000))
    command = [sys.executable, "-m", "ipfsfuse", "export", user.add(user.folder / "large"), "-"]
    for number, code in ((None, 141), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)):
        with subprocess.Popen(
            command, env=user.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as export:
            assert export.stdout is not None
            assert export.stderr is not None
            assert len(export.stdout.read(10)) == 10
            if number is None:
                export.stdout.close()
            else:
                export.send_signal(number)
            assert export.wait(60) == code
            assert export.stderr.read() == b""
