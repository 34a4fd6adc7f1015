"""The rights of the daemon: it gives up new privileges and most files, changes to another user, and mounts
without fusermount3 and in a user namespace."""

import hashlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ipfsfuse.confinement import landlock_abi
from ipfsfuse.dag import cid as cids
from ipfsfuse.fuse.session import MountHelper
from tests.mounting import NOBODY, Home, alive, wait_until
from tests.sources.authority import Authority
from tests.sources.content import raw_blocks
from tests.sources.servers import Server

pytestmark = pytest.mark.fuse
TOP = Path(__file__).parents[2]
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
needs_landlock = pytest.mark.skipif(landlock_abi() == 0, reason="this kernel has no landlock")


def status(pid: int, key: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{key}:"))


# -- confinement ---------------------------------------------------------------------------------------------


def test_the_daemon_gives_up_new_privileges_and_reports_that(user: Home) -> None:
    with user.mounted() as mount:
        assert status(mount.pid, "NoNewPrivs") == "1"
        log = user.run("logs").stdout
        assert "the daemon is confined by no_new_privs" in log
        assert ("stays root" in log) == (os.getuid() == 0)
        found = {each["about"]: each["found"] for each in user.json("doctor", "--json")}
        assert "no_new_privs" in found["the daemon is confined"]
    with user.mounted("--unconfined") as mount:
        assert status(mount.pid, "NoNewPrivs") == "0"


DAC_OVERRIDE, DAC_READ_SEARCH, SYS_ADMIN = 1 << 1, 1 << 2, 1 << 21


def capabilities(pid: int) -> set[int]:
    """The capabilities of all threads, in all sets."""
    return {
        int(line.split()[1], 16)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for line in (task / "status").read_text().splitlines()
        if line.startswith(("CapPrm", "CapEff", "CapBnd", "CapAmb", "CapInh"))
    }


@as_root
@pytest.mark.parametrize("case", ["default", "log of another user", "--passthrough", "--unconfined"])
def test_a_daemon_that_stays_root_keeps_few_capabilities(user: Home, case: str) -> None:
    """It reads a CAR file of another user, writes a log in a folder of another user, and unmounts. With
    `--passthrough` it may give the kernel files to read."""
    (user.folder / "in-car").write_bytes(data := os.urandom(100_000))
    cid = user.add(user.folder / "in-car")
    car = user.folder / "others.car"
    user.run("export", cid, car)
    user.run("rm", cid)
    os.chown(car, NOBODY, NOBODY)
    car.chmod(0o600)
    options, expected = ["--from", str(car)], DAC_READ_SEARCH
    if case == "log of another user":
        logs = user.folder / "logs"
        logs.mkdir(mode=0o700)
        os.chown(logs, NOBODY, NOBODY)
        options += ["--log-file", str(logs / "log")]
        expected |= DAC_OVERRIDE
    elif case == "--passthrough":
        options.append(case)
        expected |= SYS_ADMIN
    elif case == "--unconfined":
        options.append(case)
    if case == "--passthrough" and user.run("mount", *options, user.mountpoint, check=False).returncode:
        pytest.skip("this machine has no FUSE passthrough")
    if case == "--passthrough":
        user.run("unmount", user.mountpoint)
    with user.mounted(*options) as mount:
        assert (mount.path / cid).read_bytes() == data
        if case == "--unconfined":
            assert max(capabilities(mount.pid)) > SYS_ADMIN
            return
        held = capabilities(mount.pid)
        assert held - {0} == {expected}, [f"{each:x}" for each in held]
        if case == "log of another user":
            assert "capabilities (kept: dac_read_search, dac_override)" in (logs / "log").read_text()
    assert not os.path.ismount(user.mountpoint)


CONFINED = """
import os, socket, subprocess, sys
from pathlib import Path
from ipfsfuse import process
from ipfsfuse.cache.store.folder import lock_folder
from ipfsfuse.config import MountConfig

cache, library, point, secret = map(Path, sys.argv[1:])
with lock_folder(cache) as folder:
    for name in ("staging", "packs"):
        (folder.path / name).mkdir(exist_ok=True)
    process.confine(MountConfig(mountpoint=point, cache_dir=cache, library=library), folder, [], [])
    (folder.path / "staging" / "x").write_text("x")  # its own file
    (folder.path / "staging" / "x").replace(folder.path / "packs" / "x")
    sorted(library.iterdir())
    Path("/etc/hosts").read_text()

    def refused(name, call, *arguments, kind=PermissionError):
        try:
            call(*arguments)
        except kind:
            print(name)

    refused("reads no secret", secret.read_text)
    refused("writes no other file", (secret.parent / "new").write_text, "x")
    refused("writes nothing into the library", (library / "new").write_text, "x")
    refused("lists no home", os.listdir, secret.parent)
    refused("lists no secrets of services", os.listdir, "/run")
    refused("reads no disk", open, "/dev/full", "rb")  # or another device
    refused("starts no program", subprocess.run, ["/bin/true"])
    with socket.socket() as listener:
        refused("listens nowhere", listener.bind, ("127.0.0.1", 0))
    refused("ends no other process", os.kill, os.getppid(), 0)
    if os.getuid() == 0:
        refused("reads no environment", Path(f"/proc/{os.getppid()}/environ").read_bytes)
        refused("gives nothing away", os.chown, cache, 1, 1)
        refused("changes no mode of another's", os.chmod, secret, 0o644)
"""


@needs_landlock
@pytest.mark.parametrize("cache", ["cache", "."], ids=["a folder", "the home folder"])
def test_a_confined_daemon_reaches_only_its_own_files(user: Home, cache: str) -> None:
    secret = user.folder / "home" / ".ssh" / "id"
    secret.parent.mkdir(parents=True)
    secret.write_text("secret")
    if os.getuid() == 0:
        os.chown(secret, NOBODY, NOBODY)
    user.run("library")
    command = [sys.executable, "-c", CONFINED, user.folder / cache, user.library, user.mountpoint, secret]
    done = subprocess.run(command, env=user.env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    refused = done.stdout.splitlines()
    expected = ["reads no secret", "writes no other file", "writes nothing into the library", "lists no home"]
    expected += ["lists no secrets of services", "reads no disk", "starts no program"]
    expected += ["listens nowhere"] * (landlock_abi() >= 4) + ["ends no other process"] * (
        landlock_abi() >= 6
    )
    if os.getuid() == 0:
        expected += ["reads no environment", "gives nothing away", "changes no mode of another's"]
    assert refused == expected


@needs_landlock
def test_a_confined_mount_loads_its_modules_wherever_it_is_started(user: Home) -> None:
    """An editable installation is not on `sys.path`."""
    del user.env["PYTHONPATH"]
    elsewhere = user.folder / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "ipfsfuse", "mount", "--foreground", "--json", user.mountpoint]
    with subprocess.Popen(
        command, env=user.env, cwd=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        printed = daemon.stdout.readline()
        daemon.send_signal(signal.SIGTERM)
        _out, err = daemon.communicate(timeout=60)
    assert printed, err
    assert daemon.returncode == 0, err


def test_a_confined_mount_follows_links_to_other_places(user: Home) -> None:
    """Links lead to the cache, the library, a CAR file and the configuration. The configuration is replaced,
    and the log is moved away, while the mount runs."""
    away = user.folder.with_name("away")
    for name in ("cache", "library", "cars", "dotfiles", "logs"):
        (away / name).mkdir(parents=True, mode=0o700)
    user.cache.symlink_to(away / "cache")
    user.library.symlink_to(away / "library")
    (user.folder / "in-car").write_bytes(in_car := os.urandom(100_000))
    carried = user.add(user.folder / "in-car")
    user.run("export", carried, away / "cars" / "real.car")
    user.run("rm", carried)
    (user.folder / "link.car").symlink_to(away / "cars" / "real.car")
    config = user.folder / ".config" / "ipfsfuse" / "config.toml"
    config.parent.mkdir(parents=True)
    config.symlink_to(away / "dotfiles" / "ipfsfuse.toml")
    config.write_text('budget = "64MiB"\n')
    log = away / "logs" / "mount.log"
    options = ["--from", "library", "--from", "link.car", "--log-file", str(log)]
    made = json.loads(user.run("mount", "--json", *options, user.mountpoint, cwd=user.folder).stdout)
    try:
        assert (user.mountpoint / carried).read_bytes() == in_car
        (user.folder / "later").write_bytes(later := os.urandom(100_000))
        assert (user.mountpoint / user.add(user.folder / "later")).read_bytes() == later
        (away / "dotfiles" / "new").write_text('budget = "32MiB"\n')
        (away / "dotfiles" / "new").replace(away / "dotfiles" / "ipfsfuse.toml")
        log.rename(away / "logs" / "mount.log.1")
        os.kill(made["pid"], signal.SIGHUP)
        wait_until(lambda: user.json("status", "--json")["cache"]["budget"] == 32 << 20, "the new budget")
        assert "opened anew" in log.read_text()
    finally:
        user.run("unmount", user.mountpoint)


def test_a_confined_mount_reads_a_repository_whose_blocks_lie_elsewhere(user: Home) -> None:
    """No node runs, so the content comes from the files of the repository."""
    block = os.urandom(1000)
    cid = cids.make(cids.RAW, b"\x12\x20" + hashlib.sha256(block).digest())
    name = cids.multihash_base32(cid)
    blocks = user.folder.with_name("disk") / "blocks"
    (blocks / name[-3:-1]).mkdir(parents=True)
    (blocks / name[-3:-1] / f"{name}.data").write_bytes(block)
    (blocks / "SHARDING").write_text("/repo/flatfs/shard/v1/next-to-last/2\n")
    place = {"mountpoint": "/blocks", "type": "flatfs", "shardFunc": "/repo/flatfs/shard/v1/next-to-last/2"}
    repository = user.folder.with_name("disk") / "repo"
    repository.mkdir()
    (repository / "datastore_spec").write_text(json.dumps({"mounts": [{**place, "path": str(blocks)}]}))
    (user.folder / ".ipfs").symlink_to(repository)
    user.env["IPFS_PATH"] = str(user.folder / ".ipfs")
    (user.folder / ".config" / "ipfs" / "denylists").mkdir(parents=True)
    with user.mounted("--from", "kubo") as mount:
        assert (mount.path / cids.text(cid)).read_bytes() == block
        assert "blocks that the node has are read in its repository" in mount.log()
        assert "blocked" not in mount.log()


def test_a_confined_mount_reads_certificates_and_headers_elsewhere(user: Home) -> None:
    folder = user.folder.with_name("secrets")
    folder.mkdir()
    authority = Authority(folder)
    user.env["SSL_CERT_FILE"] = str(user.folder / "authority.pem")
    (user.folder / "authority.pem").symlink_to(authority.certificate)
    (folder / "headers").write_text("X-Key: secret\n")
    (folder / "headers").chmod(0o600)
    (user.folder / "headers").symlink_to(folder / "headers")
    blocks = raw_blocks(3, 1)
    with Server(blocks, tls=authority.server_context("IP:127.0.0.1")) as server:
        headers = f"{server.url}={user.folder / 'headers'}"
        with user.mounted("--from", server.url, "--header-file", headers) as mount:
            for cid, block in blocks.items():
                assert (mount.path / cids.text(cid)).read_bytes() == block
        assert {ask.headers.get("x-key") for ask in server.asked} == {"secret"}


@needs_landlock
def test_a_log_in_a_home_folder_gives_no_access_to_the_folder(user: Home) -> None:
    """The daemon may write the log file only, and the log says what follows from that."""
    log = user.folder / "mount.log"
    with user.mounted("--log-file", log) as mount:
        assert f"--log-file {log}: a confined daemon may not write all of {user.folder}" in log.read_text()
        log.rename(user.folder / "moved.log")
        os.kill(mount.pid, signal.SIGHUP)
        moved = user.folder / "moved.log"
        wait_until(lambda: "the log can't be opened anew" in moved.read_text(), "the error is logged")
        assert not log.exists()


@needs_landlock
def test_a_library_that_was_made_anew_is_reported_in_one_line(user: Home) -> None:
    """Landlock allows a folder by its inode, so it does not allow the new folder."""
    with user.mounted() as mount:
        shutil.rmtree(user.library)
        (user.folder / "f").write_text("hello\n")
        cid = user.add(user.folder / "f")
        with pytest.raises(OSError):
            (mount.path / cid).read_text()
        [error] = [line for line in mount.log().splitlines() if "made anew" in line]
        assert f"the library {user.library} can't be read" in error
        assert "mount again" in error
        assert "Traceback" not in mount.log()
    with user.mounted() as mount:
        assert (mount.path / cid).read_text() == "hello\n"


def test_the_shell_that_unmounts_for_a_daemon_unmounts_no_other_live_mount(tmp_path: Path) -> None:
    """The shell is not confined, and a shell of root may unmount anything."""
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n')
    program.chmod(0o755)
    other = "".join(f"\\0{byte:03o}" for byte in os.fsencode(tmp_path))
    subprocess.run(
        ["/bin/sh", "-c", MountHelper._UNMOUNT, "sh", "/mnt/ours", program],
        input=f"any {other}\ndead {other}\nother {other}\n",
        text=True,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "asked").read_text().split("\n") == ["-u -q -- /mnt/ours", "-u -q -- /mnt/ours", ""]


# -- another user --------------------------------------------------------------------------------------------


def open_to_all() -> str:
    """A script that lets every user reach this Python and this checkout, in this mount namespace only."""
    script = "set -e; "
    for path in {Path(sys.base_prefix).resolve(), Path(sys.prefix), TOP}:
        closed = [each for each in reversed(path.parents) if not os.stat(each).st_mode & 0o001]
        if closed:
            top = closed[0]
            script += (
                f"mkdir -p /mnt/here && mount --bind {path} /mnt/here && mount -t tmpfs -o mode=755 none {top} "
                f"&& mkdir -p {path} && mount --move /mnt/here {path}; "
            )
    return script


@as_root
def test_root_mounts_and_goes_on_as_another_user(user: Home, tmp_path: Path) -> None:
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    os.chown(user.folder, NOBODY, NOBODY)  # the mountpoint stays root's: root mounts
    point = user.mountpoint
    script = f"""
    {open_to_all()}
    run() {{ {sys.executable} -m ipfsfuse "$@"; }}
    nobody() {{ setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups "$@"; }}
    echo hello > /tmp/hello.$$
    cid=$(nobody {sys.executable} -m ipfsfuse add -Q /tmp/hello.$$); rm /tmp/hello.$$
    run mount --json --user {NOBODY} {point} | tr ',' '\\n' | sed -n 's/.*"pid": *\\([0-9]*\\).*/\\1/p' > {tmp_path}/pid
    pid=$(cat {tmp_path}/pid)
    grep -E '^(Uid|Gid|Groups|CapEff):' /proc/$pid/status
    nobody cat {point}/$cid
    ls {point} 2>&1 || echo root may not enter
    stat -c '%u' {user.cache}/ipfsfuse-cache
    sed -n '\\|{point} |s/.*fuse.ipfsfuse.*\\(user_id=[0-9]*\\).*/\\1/p' /proc/self/mountinfo
    nobody {sys.executable} -m ipfsfuse logs | grep -c 'goes on as user'
    kill $pid
    while grep -qs '^State:.[^Z]' /proc/$pid/status; do sleep 0.05; done
    grep -c {point} /proc/self/mountinfo || echo unmounted
    run mount --user {NOBODY} {point} 2>/dev/null
    if [ -e /etc/mtab ]  # fusermount3 reads there whose mount it is
    then nobody {sys.executable} -m ipfsfuse unmount {point} && echo by its user
    else run unmount {point} && echo by root
    fi
    """
    command = ["unshare", "--mount", "--propagation", "private", "bash", "-c", script]
    done = subprocess.run(command, env=user.env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.split("\n")
    groups = sorted(os.getgrouplist(pwd.getpwuid(NOBODY).pw_name, NOBODY))
    assert [line.split() for line in lines[:4]] == [
        ["Uid:", *[str(NOBODY)] * 4],
        ["Gid:", *[str(NOBODY)] * 4],
        ["Groups:", *map(str, groups)],
        ["CapEff:", "0" * 16],
    ]
    assert lines[4] == "hello"
    assert lines[6:] == [
        "root may not enter", str(NOBODY), f"user_id={NOBODY}", "1", "0", "unmounted",
        "by its user" if os.path.exists("/etc/mtab") else "by root", "",
    ]  # fmt: skip


@as_root
def test_the_option_user_needs_an_existing_user_and_root(user: Home) -> None:
    user.refused("mount", "--user", "no-such-user", user.mountpoint, names="has no such user", code=2)
    wrapper = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    wrapper += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
    user.refused("mount", "--user", "daemon", user.mountpoint, names="only root", code=2, wrapper=wrapper)


# -- without fusermount3, and without root ------------------------------------------------------------------

HIDE = "mount --bind /dev/null $(readlink -f $(command -v fusermount3)); "


def in_namespace(user: Home, options: list[str], script: str) -> "subprocess.CompletedProcess[str]":
    command = ["unshare", *options, "--propagation", "private", "sh", "-ec", script]
    return subprocess.run(command, env=user.env, capture_output=True, text=True, check=False, timeout=60)


def user_namespaces() -> bool:
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode
    )


@pytest.mark.skipif(not user_namespaces(), reason="this machine has no user namespaces for this user")
@pytest.mark.parametrize("hide", ["", HIDE], ids=["with fusermount3", "without fusermount3"])
def test_a_user_namespace(user: Home, hide: str) -> None:
    """As in a rootless container: root inside, an ordinary user outside."""
    (user.folder / "f").write_text("hello\n")
    cid = user.add(user.folder / "f")
    run = f"{sys.executable} -m ipfsfuse"
    script = f"""
    {hide}
    {run} mount {user.mountpoint} 2>/dev/null
    cat {user.mountpoint}/{cid}
    ! touch {user.mountpoint}/x 2>/dev/null
    {run} status >/dev/null
    {run} unmount {user.mountpoint}
    ls -A {user.mountpoint}
    """
    done = in_namespace(user, ["-Urm"], script)
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr


@as_root
def test_the_first_process_of_a_container_ends_while_it_starts(user: Home, tmp_path: Path) -> None:
    """The kernel drops signals for which the first process has no handler."""
    (tmp_path / "trio.py").write_text("import time\ntime.sleep(20)\n")  # a start that takes long
    env = user.env | {"PYTHONPATH": f"{tmp_path}:{user.env['PYTHONPATH']}"}
    mount = [sys.executable, "-m", "ipfsfuse", "mount", "--foreground", user.mountpoint]
    with subprocess.Popen(["unshare", "--pid", "--fork", *mount], env=env) as running:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        while running.poll() is None and not (first := children.read_text().split()):
            time.sleep(0.02)
        status = Path(f"/proc/{first[0]}/status")
        while running.poll() is None and not caught(status) >> (signal.SIGTERM - 1) & 1:
            time.sleep(0.02)
        os.kill(int(first[0]), signal.SIGTERM)
        assert running.wait(20) == 128 + signal.SIGTERM


def caught(status: Path) -> int:
    """The signals that a process has handlers for, as a mask."""
    return int(status.read_text().split("SigCgt:")[1].split()[0], 16)


@as_root
def test_root_mounts_without_fusermount3_and_a_killed_daemon_leaves_nothing(user: Home) -> None:
    run = f"{sys.executable} -m ipfsfuse"
    script = f"""
    {HIDE}
    {run} mount --json {user.mountpoint} 2>/dev/null | sed 's/.*"pid": *\\([0-9]*\\).*/\\1/' > {user.folder}/pid
    {run} doctor | grep -c 'root mounts without it'
    cd {user.mountpoint}
    {run} unmount {user.mountpoint} 2>&1 | grep -c 'is busy'
    cd /
    kill -9 $(cat {user.folder}/pid)
    while grep -q {user.mountpoint} /proc/self/mountinfo; do sleep 0.02; done
    echo freed
    """
    done = in_namespace(user, ["-m"], script)
    assert (done.returncode, done.stdout) == (0, "1\n1\nfreed\n"), done.stderr


def test_a_daemon_whose_shells_were_killed_still_ends(user: Home) -> None:
    with user.mounted() as mount:
        children = Path(f"/proc/{mount.pid}/task/{mount.pid}/children").read_text().split()
        shells = [pid for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == "sh"]
        assert shells
        for pid in shells:
            os.kill(int(pid), signal.SIGKILL)
        os.kill(mount.pid, signal.SIGTERM)
        wait_until(lambda: not alive(mount.pid), "the daemon has ended")
        wait_until(lambda: not os.path.ismount(mount.path), "the mount is gone")
