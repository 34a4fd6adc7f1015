"""Blocks made to do harm, on a real mount: each has its stated answer, the daemon stays small, others go on."""

import errno
import os
import subprocess

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import MURMUR3, Link
from ipfsfuse.dag.unixfs import Type, UnixFS
from tests.dagging import Dag
from tests.faults.gateway import errno_of
from tests.mounting import Home

MEMORY = 300 << 20
"""What the daemon's resident memory stays below, in bytes."""


def shards(dag: Dag, leaf: Cid, names: list[bytes]) -> Cid:
    """A HAMT directory of `names`, all of one leaf, 256 wide."""
    from ipfsfuse.dag import hamt

    def build(entries: list[tuple[int, bytes]], depth: int) -> Cid:
        slots: dict[int, list[tuple[int, bytes]]] = {}
        for key, name in entries:
            slots.setdefault(key >> (56 - 8 * depth) & 255, []).append((key, name))
        links, bits = [], 0
        for index in sorted(slots):
            bits |= 1 << index
            prefix = b"%02X" % index
            inside = slots[index]
            links.append(Link(leaf, prefix + inside[0][1], 1) if len(inside) == 1 else Link(build(inside, depth + 1), prefix, len(inside)))
        field = bits.to_bytes(32, "big").lstrip(b"\0")
        return dag.node(links, UnixFS(type=Type.HAMT_SHARD, data=field, hash_type=MURMUR3, fanout=256))

    return build([(hamt.hash64(name), name) for name in names], 0)


@pytest.mark.slow
def test_a_directory_of_a_million_entries_is_listed_and_looked_up(home: Home) -> None:
    dag = Dag()
    leaf = dag.block(b"x")
    root = shards(dag, leaf, [b"entry-%07d" % n for n in range(1_000_000)])
    with home.mounted("--from", dag.car(home.folder / "million.car")) as mount:
        folder = mount.path / cids.text(root)
        assert (folder / "entry-0999999").read_bytes() == b"x"
        listed = subprocess.run(["sh", "-c", f"ls -f '{folder}' | grep -c entry-"], capture_output=True, text=True, timeout=600)
        assert listed.stdout.strip() == "1000000"
        assert (mount.path / cids.text(leaf)).read_bytes() == b"x"
        assert mount.peak_memory() < MEMORY


def test_a_zip_bomb_costs_what_is_read(home: Home) -> None:
    dag = Dag()
    leaf = dag.block(bytes(1 << 20))
    here, size = leaf, 1 << 20
    for _ in range(6):  # 1,000 links a level: a block that stands there 10^18 times, cut off where a file system ends
        width = min(1000, ((1 << 63) - 1) // size)
        here = dag.node([Link(here, b"", size)] * width, UnixFS(type=Type.FILE, filesize=size * width, blocksizes=[size] * width))
        size *= width
    with home.mounted("--from", dag.car(home.folder / "bomb.car")) as mount:
        file = mount.path / cids.text(here)
        assert file.stat().st_size == size
        with file.open("rb", buffering=0) as opened:
            for place in (0, size // 2, size - 10):
                assert os.pread(opened.fileno(), 10, place) == bytes(10)
            for _ in range(64):
                assert len(opened.read(1 << 20)) > 0
        assert (mount.path / cids.text(leaf)).stat().st_size == 1 << 20
        assert mount.peak_memory() < MEMORY


def test_a_hamt_that_never_ends_is_eio_and_others_go_on(home: Home) -> None:
    """A node can't hold its own hash: so one whose every slot leads to one and the same deeper node, all the way down."""
    dag = Dag()
    good = dag.directory({b"file": (dag.block(b"good"), 4)})
    here = dag.node([], UnixFS(type=Type.HAMT_SHARD, data=b"", hash_type=MURMUR3, fanout=256))
    for _ in range(12):
        links = [Link(here, b"%02X" % index, 1) for index in range(256)]
        here = dag.node(links, UnixFS(type=Type.HAMT_SHARD, data=b"\xff" * 32, hash_type=MURMUR3, fanout=256))
    with home.mounted("--from", dag.car(home.folder / "endless.car")) as mount:
        folder = mount.path / cids.text(here)
        assert errno_of(folder / "any") == "EIO"
        with pytest.raises(OSError) as raised:
            os.listdir(folder)
        assert raised.value.errno == errno.EIO
        assert (mount.path / cids.text(good) / "file").read_bytes() == b"good"
        assert mount.peak_memory() < MEMORY


def test_a_symlink_of_a_mebibyte_is_eio(home: Home) -> None:
    dag = Dag()
    link = dag.symlink(b"t" * (1 << 20))
    root = dag.directory({b"link": (link, 1), b"good": (dag.block(b"good"), 4)})
    with home.mounted("--from", dag.car(home.folder / "link.car")) as mount:
        with pytest.raises(OSError) as raised:
            os.readlink(mount.path / cids.text(root) / "link")
        assert raised.value.errno == errno.EIO
        assert (mount.path / cids.text(root) / "good").read_bytes() == b"good"
        assert mount.peak_memory() < MEMORY


HOSTILE = {
    "links of one byte": b"\x12\x00" * (1 << 20),
    "deep varints": b"\x12" + b"\xff" * ((2 << 20) - 1),
    "a link that claims 2 GiB": (b"\x12\xff\xff\xff\xff\x07" + bytes(2 << 20))[: 2 << 20],
    "block sizes without links": b"\x0a\xfa\xff\x7f\x08\x02" + b"\x20\x01" * ((1 << 20) - 4),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_block_of_two_mebibytes_is_eio(home: Home, name: str) -> None:
    dag = Dag()
    bad, good = dag.block(HOSTILE[name], cids.DAG_PB), dag.block(b"good")
    with home.mounted("--from", dag.car(home.folder / "hostile.car")) as mount:
        assert errno_of(mount.path / cids.text(bad)) == "EIO"
        assert (mount.path / cids.text(good)).read_bytes() == b"good"
        assert mount.peak_memory() < MEMORY
