"""Sources that send wrong bytes, malformed blocks, wrong sizes, and very large or deep content."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import make
from ipfsfuse.dag.nodes import Link
from ipfsfuse.dag.unixfs import Type, UnixFS
from tests.dagging import Dag
from tests.faults.gateway import errno_of, mounted
from tests.mounting import PATIENCE, Home


def test_a_lying_source_gives_eio_and_never_a_byte(home: Home) -> None:
    dag = Dag()
    good, bad = dag.block(b"good bytes\n"), dag.block(b"bad bytes!\n")
    root = dag.directory({b"good": (good, 11), b"bad": (bad, 11)})
    with mounted(home, dag) as (gateway, mount):
        gateway.lying.add(cids.text(bad))
        assert errno_of(mount.path / cids.text(root) / "bad") == "EIO"
        assert (mount.path / cids.text(root) / "good").read_bytes() == b"good bytes\n"
        (source,) = mount.status()["sources"]
        assert source["wrong"] >= 1


def test_a_bad_child_does_not_spoil_a_listing(home: Home) -> None:
    dag = Dag()
    absent = make(cids.DAG_PB, b"\x12\x20" + bytes(32))
    cbor = make(0x51, b"\x12\x20" + bytes(32))
    root = dag.directory({b"absent": (absent, 1), b"cbor": (cbor, 1), b"good": (dag.block(b"good"), 4)})
    with mounted(home, dag) as (_, mount):
        folder = mount.path / cids.text(root)
        assert sorted(os.listdir(folder)) == ["absent", "cbor", "good"]
        assert errno_of(folder / "cbor") == "ENOTSUP"
        assert (folder / "good").read_bytes() == b"good"


def test_codecs_that_are_not_shown_are_enotsup(home: Home) -> None:
    dag = Dag()
    with mounted(home, dag) as (gateway, mount):
        for codec in (0x51, 0x78, 0x0200, 0x72):
            assert errno_of(mount.path / cids.text(make(codec, b"\x12\x20" + bytes(32)))) == "ENOTSUP"
        assert errno_of(mount.path / cids.text(make(cids.RAW, b"\xd5\x01\x10" + bytes(16)))) == "ENOTSUP", (
            "md5 is not allowed"
        )
        assert not gateway.asked


def test_malformed_blocks_are_eio(home: Home) -> None:
    dag = Dag()
    leaf = dag.block(b"x" * 100)
    cases = {
        "no protobuf": dag.block(b"\xff" * 20, cids.DAG_PB),
        "sizes missing": dag.node([Link(leaf, b"", 100)], UnixFS(type=Type.FILE, filesize=100)),
        "wrong filesize": dag.node(
            [Link(leaf, b"", 100)], UnixFS(type=Type.FILE, filesize=1 << 62, blocksizes=[100])
        ),
        "named link in a file": dag.node(
            [Link(leaf, b"n", 100)], UnixFS(type=Type.FILE, filesize=100, blocksizes=[100])
        ),
    }
    with mounted(home, dag) as (_, mount):
        assert {name: errno_of(mount.path / cids.text(cid)) for name, cid in cases.items()} == dict.fromkeys(
            cases, "EIO"
        )


def test_a_child_with_a_wrong_size_is_eio_only_where_its_bytes_should_be(home: Home) -> None:
    dag = Dag()
    short = dag.block(b"s" * 1000)
    honest = dag.block(b"h" * 100_000)
    file = dag.node(
        [Link(honest, b"", 100_000), Link(short, b"", 1000)],
        UnixFS(type=Type.FILE, filesize=102_000, blocksizes=[100_000, 2000]),
    )
    with mounted(home, dag) as (_, mount), (mount.path / cids.text(file)).open("rb", buffering=0) as opened:
        assert os.pread(opened.fileno(), 10, 0) == b"h" * 10
        with pytest.raises(OSError) as raised:
            os.pread(opened.fileno(), 10, 101_900)
        assert raised.value.errno == errno.EIO


def test_a_wrong_claimed_size_is_corrected_at_open(home: Home) -> None:
    dag = Dag()
    raw = dag.block(b"true bytes")
    root = dag.directory({b"lie": (raw, 1_000_000)})
    with mounted(home, dag) as (gateway, mount):
        file = mount.path / cids.text(root) / "lie"
        assert [entry.name for entry in os.scandir(mount.path / cids.text(root))] == ["lie"]
        assert cids.text(raw) not in gateway.asked
        with file.open("rb") as opened:
            assert os.fstat(opened.fileno()).st_size == 10
            assert opened.read() == b"true bytes"
        assert file.stat().st_size == 10


def test_a_file_of_2_to_the_62_bytes_can_be_opened_and_read(home: Home) -> None:
    dag = Dag()
    leaf = dag.block(b"z" * (1 << 20))
    inner, size = leaf, 1 << 20
    while size < 1 << 62:
        inner = dag.node(
            [Link(inner, b"", size)] * 4, UnixFS(type=Type.FILE, filesize=4 * size, blocksizes=[size] * 4)
        )
        size *= 4
    with mounted(home, dag) as (gateway, mount):
        file = mount.path / cids.text(inner)
        assert file.stat().st_size == size
        with file.open("rb", buffering=0) as opened:
            assert os.pread(opened.fileno(), 3, size // 3) == b"zzz"
        assert len(gateway.asked) < 50
        assert (mount.path / cids.text(leaf)).stat().st_size == 1 << 20
        assert mount.peak_memory() < 300 << 20


def test_a_tree_10000_deep_is_walked(home: Home) -> None:
    dag = Dag()
    here = dag.block(b"bottom")
    for _ in range(10_000):
        here = dag.directory({b"d": (here, 1)})
    with home.mounted("--from", dag.car(home.folder / "deep.car")) as mount:
        top = os.open(mount.path / cids.text(here), os.O_RDONLY | os.O_PATH)
        for _ in range(9_999):
            below = os.open("d", os.O_RDONLY | os.O_PATH, dir_fd=top)
            os.close(top)
            top = below
        with os.fdopen(os.open("d", os.O_RDONLY, dir_fd=top), "rb") as bottom:
            assert bottom.read() == b"bottom"
        os.close(top)
        assert os.listdir(mount.path / cids.text(here)) == ["d"]
        assert mount.peak_memory() < 300 << 20


def test_a_hundred_readers_of_one_cold_file_cause_one_request_for_each_block(home: Home) -> None:
    dag = Dag()
    file = dag.file([bytes([n]) * (1 << 20) for n in range(4)])
    with mounted(home, dag) as (gateway, mount):
        script = (
            f"import sys; assert len(open({str(mount.path / cids.text(file))!r}, 'rb').read()) == 4 << 20"
        )
        readers = [subprocess.Popen([sys.executable, "-S", "-c", script]) for _ in range(100)]
        assert [reader.wait(120) for reader in readers] == [0] * 100
        assert set(gateway.asked.values()) == {1}
        assert len(gateway.asked) == 5


def test_offline_a_missing_block_fails_at_once(home: Home) -> None:
    dag = Dag()
    read, unread = dag.block(b"read"), dag.block(b"unread")
    with mounted(home, dag) as (_, mount):
        assert (mount.path / cids.text(read)).read_bytes() == b"read"
    with home.mounted("--offline", "--deadline", "1h") as mount:
        assert (mount.path / cids.text(read)).read_bytes() == b"read"
        failed = subprocess.run(
            ["cat", mount.path / cids.text(unread)],
            env={**home.env, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert "Connection timed out" in failed.stderr


def test_a_read_that_fails_under_mmap_is_sigbus(home: Home) -> None:
    dag = Dag()
    leaves = [b"a" * (1 << 20), b"b" * (1 << 20), b"c" * (1 << 20)]
    file = dag.file(leaves)
    with mounted(home, dag) as (gateway, mount):
        gateway.lying.add(cids.text(dag.block(leaves[2])))
        script = (
            "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1); "
            "print(m[0], flush=True); m[5 << 19]"
        )
        done = subprocess.run(
            [sys.executable, "-S", "-c", script, mount.path / cids.text(file)], capture_output=True, text=True
        )
        assert (done.stdout, done.returncode) == ("97\n", -signal.SIGBUS)


def test_a_file_of_stored_mode_0_can_be_read(home: Home) -> None:
    dag = Dag()
    file = dag.node([], UnixFS(type=Type.FILE, data=b"secret?", filesize=7, mode=0))
    with mounted(home, dag) as (_, mount):
        assert os.stat(mount.path / cids.text(file)).st_mode & 0o777 == 0
        assert (
            subprocess.run(["cat", mount.path / cids.text(file)], capture_output=True, check=True).stdout
            == b"secret?"
        )
