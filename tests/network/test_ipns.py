"""`mount --ipns`: names as symlinks, on real mounts, with records of real nodes and of test servers."""

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.kubo.fixtures import need_kubo
from tests.kubo.node import Node
from tests.mounting import Home, Mounted, alive, fuse_mounts, wait_until
from tests.sources.ipns import NameServer, make, name_of
from tests.sources.test_names import DnsServer

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(9)]
NAMES = [str(name_of(key)) for key in KEYS]


@contextmanager
def mounted_with_names(home: Home, *options: str | Path) -> Iterator[tuple[Mounted, Path]]:
    names = home.folder / "ipns"
    names.mkdir(exist_ok=True)
    with home.mounted(*options, "--ipns", names) as mount:
        yield mount, names
    assert fuse_mounts(home.folder) == []


def add_folder(home: Home, text: str) -> str:
    folder = home.folder / f"tree-{text}"
    folder.mkdir()
    (folder / "file").write_text(text)
    return home.add(folder)


def error_of(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as exc:
        return exc.errno
    return None


@pytest.mark.kubo
def test_names_of_a_real_node_are_links_to_what_it_published(home: Home) -> None:
    need_kubo()
    with Node(settings={"Routing": {"Type": "dhtclient"}}) as node:
        node.cmd("key", "gen", "--type=rsa", "--size=2048", "rsa")
        cid = node.add(b"hello")
        keys = (
            node.cmd("key", "list", "-l").splitlines()
            + node.cmd("key", "list", "-l", "--ipns-base=b58mh").splitlines()
        )
        for key in ("self", "rsa"):
            node.cmd("name", "publish", "--allow-offline", f"--key={key}", "--ttl=1s", f"/ipfs/{cid}")
        for source in (f"kubo+{node.api_url}", node.gateway_url):
            with mounted_with_names(home, "--from", source) as (mount, names):
                for line in keys:
                    link = names / line.split()[0]
                    assert os.readlink(link) == f"{mount.path}/{cid}"
                    assert link.read_bytes() == b"hello"
                assert len(os.listdir(names)) == 2  # each name is listed once, in its usual spelling
        home.env["IPFS_PATH"] = str(node.repo)
        for line in keys[:2]:  # without a mount, the node is a source by default
            assert home.run("cat", f"/ipns/{line.split()[0]}").stdout == "hello"
        newer = node.add(b"newer")
        with mounted_with_names(home, "--from", f"kubo+{node.api_url}") as (mount, names):
            link = names / keys[0].split()[0]
            assert link.read_bytes() == b"hello"
            node.cmd("name", "publish", "--allow-offline", "--ttl=1s", f"/ipfs/{newer}")
            wait_until(
                lambda: link.read_bytes() == b"newer", "the name leads to the content that was published last"
            )


@pytest.mark.kubo
def test_a_router_gives_records_too(home: Home, server: NameServer) -> None:
    need_kubo()
    cid = add_folder(home, "one")
    server.records[NAMES[0]] = make(KEYS[0], f"/ipfs/{cid}")
    settings = {"Routing": {"Type": "dhtclient"}, "Gateway": {"ExposeRoutingAPI": True}}
    with Node(settings=settings) as node:
        name = node.cmd("key", "list", "-l").split()[0]
        node.cmd("name", "publish", "--allow-offline", "--resolve=false", f"/ipfs/{cid}")
        routers = "--router", node.gateway_url, "--router", f"{server.url}/routing/v1"
        with mounted_with_names(home, *routers) as (mount, names):
            for each in (name, NAMES[0]):
                assert os.readlink(names / each) == f"{mount.path}/{cid}"
        with mounted_with_names(home, *routers, "--offline") as (mount, names):
            asked = server.asked[NAMES[0]]
            # the mount before has kept the record
            assert os.readlink(names / NAMES[0]) == f"{mount.path}/{cid}"
            assert error_of((names / NAMES[1]).lstat) == errno.ETIMEDOUT
            assert server.asked[NAMES[0]] == asked


def test_a_name_is_a_symlink_that_costs_no_block_and_is_kept_for_its_time_to_live(
    home: Home, server: NameServer
) -> None:
    one, two = add_folder(home, "one"), add_folder(home, "two")
    server.records[NAMES[0]] = make(KEYS[0], f"/ipfs/{one}/file", ttl=2)
    absent = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
    server.records[NAMES[1]] = make(KEYS[1], f"/ipfs/{absent}/a/ü")
    with mounted_with_names(home, "--from", "library", "--from", server.url) as (mount, names):
        link = names / NAMES[0]
        for _ in range(3):
            assert link.read_text() == "one"
        assert server.asked[NAMES[0]] == 1
        assert os.lstat(link).st_size == len(os.readlink(link))
        assert os.readlink(names / NAMES[1]) == f"{mount.path}/{absent}/a/ü"
        assert server.asked[absent] == 0
        assert sorted(os.listdir(names)) == sorted(NAMES[:2])
        server.records[NAMES[0]] = make(KEYS[0], f"/ipfs/{two}/file", 1, ttl=2)
        assert link.read_text() == "one"
        wait_until(lambda: link.read_text() == "two", "the newer record is seen")
        answer = subprocess.run(["stat", "-f", names], check=True, capture_output=True)
        assert b"Namelen: 255" in answer.stdout


def test_commands_take_names(home: Home, server: NameServer) -> None:
    """With a mount and without one, and with paths below the folder of names."""
    cid = add_folder(home, "one")
    server.records[NAMES[0]] = make(KEYS[0], f"/ipfs/{cid}")
    named = f"/ipns/{NAMES[0]}"

    def check(*sources: str) -> None:
        assert home.run("cat", *sources, f"{named}/file").stdout == "one"
        home.run("get", *sources, f"ipns://{NAMES[0]}", "-o", home.folder / "copy")
        assert (home.folder / "copy" / "file").read_text() == "one"
        shutil.rmtree(home.folder / "copy")
        absent = home.run("cat", *sources, f"/ipns/{NAMES[1]}", check=False)
        assert absent.returncode == 1
        assert absent.stderr.startswith(f"ipfsfuse: {NAMES[1]} can't be resolved: {server.url} ")
        assert absent.stderr.count("\n") == 1

    check("--from", "library", "--from", server.url)
    home.refused("cat", f"{NAMES[0]}/file", names=f"is the name of a key: write {named}", code=2)
    with mounted_with_names(home, "--from", "library", "--from", server.url, "--deadline", "5s") as (
        _mount,
        names,
    ):
        check()
        path = names / NAMES[0] / "file"
        assert home.json("pin", f"{named}/file", path, "--json")[1]["files"] == 1


def test_only_a_name_that_is_proved_absent_is_enoent(home: Home, server: NameServer) -> None:
    with DnsServer().serving() as dns:
        ways = "--from", server.url, "--dns", f"{dns.url}/dns-query"
        with mounted_with_names(home, *ways) as (mount, names):
            for name in ("README", "nowhere.example", "other.example", ".hidden", "1.2.3.4"):
                assert error_of((names / name).lstat) == errno.ENOENT
            for name in (NAMES[0], "broken.example"):
                assert error_of((names / name).lstat) == errno.ETIMEDOUT
            assert error_of((names / "bad.example").lstat) == errno.EIO
            assert error_of((names / ("x" * 256)).lstat) == errno.ENAMETOOLONG
            assert os.readlink(names / "plain.example").startswith(f"{mount.path}/bafkrei")
            assert error_of((names / os.fsdecode(b"\xff.example")).lstat) == errno.ENOENT


def test_writes_among_names_are_eperm(home: Home, server: NameServer) -> None:
    cid = add_folder(home, "one")
    server.records[NAMES[0]] = make(KEYS[0], f"/ipfs/{cid}")
    with mounted_with_names(home, "--from", "library", "--from", server.url) as (_mount, names):
        link, new = names / NAMES[0], names / "new"
        link.lstat()
        calls: list[Callable[[], object]] = [
            new.mkdir, new.touch, lambda: new.symlink_to("x"), link.unlink, lambda: os.mkfifo(new),
            lambda: os.rename(link, new), lambda: os.link(link, new, follow_symlinks=False),
            lambda: os.chown(link, 1, 1, follow_symlinks=False), lambda: os.utime(link, (1, 1), follow_symlinks=False),
            lambda: os.chmod(names, 0o777), lambda: os.setxattr(names, "user.a", b"b"),
            lambda: os.removexattr(names, "user.a"), lambda: os.open(new, os.O_CREAT | os.O_WRONLY),
        ]  # fmt: skip
        assert [error_of(call) for call in calls] == [errno.EPERM] * len(calls)
        assert not os.access(names, os.W_OK)
        assert sorted(os.listdir(names)) == [NAMES[0]]
        assert sorted(os.listdir(f"{link}/")) == ["file"]


def test_a_name_that_stalls_delays_no_other_name_and_its_caller_can_be_interrupted(
    home: Home, server: NameServer
) -> None:
    cid = add_folder(home, "one")
    with NameServer().serving() as slow:
        slow.stalled = True
        server.records[NAMES[0]] = make(KEYS[0], f"/ipfs/{cid}/file")
        with mounted_with_names(
            home, "--from", "library", "--from", server.url, "--from", slow.url, "--deadline", "4s"
        ) as (_, names):
            waiting = [subprocess.Popen(["stat", names / name], stderr=subprocess.PIPE) for name in NAMES[1:]]
            began = time.monotonic()
            assert (names / NAMES[0]).read_text() == "one"
            assert time.monotonic() - began < 3
            waiting[0].send_signal(signal.SIGINT)
            assert waiting[0].wait(3) == -signal.SIGINT
            for each in waiting[1:]:
                _out, errors = each.communicate(timeout=20)
                assert b"timed out" in errors
            waiting[0].communicate()


def test_an_older_record_replayed_after_a_restart_of_the_mount_is_not_shown(
    home: Home, server: NameServer
) -> None:
    one, two = add_folder(home, "one"), add_folder(home, "two")
    server.records[NAMES[0]] = make(KEYS[0], f"/ipfs/{two}", 8)
    for _ in range(2):
        with mounted_with_names(home, "--from", server.url) as (mount, names):
            assert os.readlink(names / NAMES[0]) == f"{mount.path}/{two}"
        server.records[NAMES[0]] = make(KEYS[0], f"/ipfs/{one}", 7)
    with mounted_with_names(home, "--from", server.url, "--offline") as (mount, names):
        assert os.readlink(names / NAMES[0]) == f"{mount.path}/{two}"


@pytest.mark.parametrize("which", ["mount", "names", "term", "kill"])
def test_ending_either_mount_ends_both(home: Home, which: str) -> None:
    names = home.folder / "ipns"
    names.mkdir()
    mount = home.json("mount", "--json", "--ipns", names, home.mountpoint)
    assert sorted(fuse_mounts(home.folder)) == sorted([str(home.mountpoint), str(names)])
    if which in ("mount", "names"):
        home.run("unmount", home.mountpoint if which == "mount" else names)
    else:
        os.kill(mount["pid"], signal.SIGTERM if which == "term" else signal.SIGKILL)
    wait_until(lambda: not alive(mount["pid"]), "the daemon ended")
    wait_until(lambda: fuse_mounts(home.folder) == [], "both mounts are gone")


def test_the_mount_survives_lookups_of_five_hundred_absent_names_at_the_same_time(
    home: Home, server: NameServer
) -> None:
    cid = add_folder(home, "one")
    server.records[NAMES[0]] = make(KEYS[0], f"/ipfs/{cid}/file", ttl=0)
    with mounted_with_names(home, "--from", "library", "--from", server.url) as (_mount, names):
        found: list[tuple[int | None, str]] = []

        def look(thread: int) -> None:
            for number in range(100):
                absent = error_of((names / f"no-{thread}-{number}").lstat)
                found.append((absent, (names / NAMES[0]).read_text()))

        threads = [Thread(target=look, args=(thread,)) for thread in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [(errno.ENOENT, "one")] * 500
        Path("/proc/sys/vm/drop_caches").write_text("2") if os.geteuid() == 0 else None
        assert (names / NAMES[0]).read_text() == "one"


def test_a_second_mountpoint_that_can_not_be_used_is_refused_in_one_line(home: Home) -> None:
    full = home.folder / "full"
    full.mkdir()
    (full / "x").touch()
    for at, names in ((full, "not empty"), (home.folder / "no", "does not exist")):
        home.refused("mount", "--ipns", at, home.mountpoint, names=names)
    (home.folder / "x").mkdir()
    for at in (home.mountpoint, home.folder):
        home.refused("mount", "--ipns", at, home.mountpoint, names="neither", code=2)
    home.refused(
        "mount", "--ipns", home.folder / "x", "--dns", "nonsense", home.mountpoint, names="nonsense", code=2
    )


@pytest.mark.kubo
def test_doctor_checks_the_routers_that_it_is_given(home: Home) -> None:
    need_kubo()
    settings = {"Routing": {"Type": "dhtclient"}, "Gateway": {"ExposeRoutingAPI": True}}
    with Node(settings=settings) as node:
        ask = "doctor", "--from", "network"
        good = home.run(*ask, "--router", node.gateway_url, "--allow-private-providers", check=False).stdout
        assert "  network: answers" in good
    assert "name a router" in home.run(*ask, check=False).stdout
    gone = home.run(*ask, "--router", node.gateway_url, check=False).stdout
    assert "bad  network: " in gone
