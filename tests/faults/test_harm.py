"""Blocks that are made to do harm, on a real mount. Each gives its documented answer, the daemon's memory
stays small, and other calls go on.

No step of the daemon's event loop, and no pass of Python's cycle collector in it, may take over 50 ms of CPU
time: meanwhile no other call is answered."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from ipfsfuse.dag import car, dagpb, unixfs
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import MURMUR3, Link
from ipfsfuse.dag.unixfs import Type, UnixFS
from tests.dagging import Dag
from tests.faults.gateway import errno_of, mounted
from tests.fuse.forest import identity
from tests.looptime.steps import no_step_is_long
from tests.mounting import Home, Mounted
from tests.sources.cars import index as index_of
from tests.sources.cars import v2


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    with no_step_is_long(home):
        yield home


MEMORY = 300 << 20
"""Bytes: the limit of the daemon's resident memory."""
LARGEST = 2 << 20
"""Bytes of the largest block that is read."""


def shards(dag: Dag, leaf: Cid, names: list[bytes]) -> Cid:
    """A HAMT directory, 256 wide, in which all `names` link one leaf."""
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
            links.append(
                Link(leaf, prefix + inside[0][1], 1)
                if len(inside) == 1
                else Link(build(inside, depth + 1), prefix, len(inside))
            )
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
        listed = subprocess.run(
            ["sh", "-c", f"ls -f '{folder}' | grep -c entry-"],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert listed.stdout.strip() == "1000000"
        assert (mount.path / cids.text(leaf)).read_bytes() == b"x"
        assert mount.peak_memory() < MEMORY


def identity_node(message: UnixFS, links: Sequence[Link] = ()) -> Cid:
    """A node in an identity CID: no block is fetched for it."""
    return identity(cids.DAG_PB, dagpb.encode(links, unixfs.encode(message)))


def thousands_of_nodes_in_cids(dag: Dag, count: int) -> Cid:
    """A directory of `count` directories and `count` symlinks, all different, in one block."""
    file = identity(cids.RAW, b"x")
    entries = {}
    for number in range(count):
        name = b"%d" % number
        entries[b"d" + name] = identity_node(UnixFS(type=Type.DIRECTORY), [Link(file, name, 1)]), 1
        entries[b"l" + name] = identity_node(UnixFS(type=Type.SYMLINK, data=name)), 1
    return dag.directory(entries)


def test_thousands_of_nodes_in_identity_cids_do_not_delay_other_calls(home: Home) -> None:
    """Nothing waits for a source here, so commands must give other tasks their turns. The time for each node
    does not grow with the number of nodes."""
    dag = Dag()
    root = cids.text(thousands_of_nodes_in_cids(dag, 2500))
    with home.mounted("--from", dag.car(home.folder / "inline.car")):
        assert home.json("prefetch", "--json", root)["directories"] == 2501
        home.run("pin", root)


def test_a_zip_bomb_costs_only_the_bytes_that_are_read(home: Home) -> None:
    dag = Dag()
    leaf = dag.block(bytes(1 << 20))
    here, size = leaf, 1 << 20
    # 1,000 links on each level: one block occurs 10^18 times. The file ends at the largest size of a file
    for _ in range(6):
        width = min(1000, ((1 << 63) - 1) // size)
        here = dag.node(
            [Link(here, b"", size)] * width,
            UnixFS(type=Type.FILE, filesize=size * width, blocksizes=[size] * width),
        )
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


def test_an_endless_hamt_is_eio_and_other_content_can_be_read(home: Home) -> None:
    """A node can't contain its own hash. So all slots of each node lead to the same deeper node."""
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


def nested(dag: Dag, count: int, smallest: int) -> tuple[list[Cid], bytes, dict[bytes, int]]:
    """Makes `count` blocks of `smallest` bytes or a little more. Each contains the whole CAR section of the
    one before. Returns the blocks, the CAR section that contains them all, and the offset in it of each
    block's section, by digest."""
    block = os.urandom(smallest)
    found, lengths = [], []
    for _ in range(count):
        cid = dag.block(block)
        del dag.blocks[cids.multihash(cid)]
        block = car.section_head(cid, len(block)) + block
        found.append(cid)
        lengths.append(len(block))
    return (
        found,
        block,
        {cids.multihash(cid)[2:]: len(block) - length for cid, length in zip(found, lengths, strict=True)},
    )


def overlapping(dag: Dag, section: bytes, offsets: dict[bytes, int]) -> bytes:
    """A CAR of version 2 with the blocks of `dag` and those that `nested` made, and its index."""
    data = bytearray(car.encode_header([]))
    places = {digest: len(data) + offset for digest, offset in offsets.items()}
    data += section
    for multihash, block in dag.blocks.items():
        places[multihash[2:]] = len(data)
        data += car.section_head(cids.make(cids.RAW, multihash), len(block)) + block
    return v2(bytes(data), index_of(places))


CLAIM = 4096


@pytest.mark.parametrize(
    ("size", "count"), [((2 << 20) - 50_000, 500), ((8 << 20) - 50_000, 100)], ids=["2 MiB", "8 MiB"]
)
def test_a_car_with_overlapping_sections_takes_no_extra_memory(home: Home, size: int, count: int) -> None:
    """Its blocks are valid. Together they are many times as large as the CAR file. The links of the file in
    it claim that they are small."""
    dag = Dag()
    leaves, section, offsets = nested(dag, count, size)
    file = file_with_false_sizes(dag, leaves)
    good = dag.block(b"good")
    (home.folder / "overlapping.car").write_bytes(overlapping(dag, section, offsets))
    with home.mounted("--from", home.folder / "overlapping.car") as mount:
        assert_reads_are_eio(mount, file)
        if size > LARGEST:
            assert errno_of(mount.path / cids.text(leaves[0])) == "EIO"
            assert "8,338,608 bytes" in mount.log()
        assert (mount.path / cids.text(good)).read_bytes() == b"good"
        assert mount.peak_memory() < MEMORY


@pytest.mark.parametrize("over", [0, 1], ids=["blocks of 2 MiB", "larger blocks"])
def test_a_repository_with_blocks_larger_than_their_links_claim_takes_no_extra_memory(
    home: Home, over: int
) -> None:
    dag = Dag()
    blocks = {
        dag.block(block): block
        for block in (number.to_bytes(8) + bytes(LARGEST + over - 8) for number in range(300))
    }
    leaves = list(blocks)
    file, good = file_with_false_sizes(dag, leaves), dag.block(b"good")
    repository(home.folder / "repository", dag)
    home.env["IPFS_PATH"] = str(home.folder / "repository")
    with home.mounted("--from", "kubo", "--deadline", "4s", "--pins", "none") as mount:
        assert_reads_are_eio(mount, file)
        if over:
            assert errno_of(mount.path / cids.text(leaves[0])) == "EIO"
            assert "2,097,153 bytes" in mount.log()
        assert (mount.path / cids.text(good)).read_bytes() == b"good"
        assert mount.peak_memory() < MEMORY


def file_with_false_sizes(dag: Dag, leaves: list[Cid]) -> Cid:
    """A file of `leaves` that claims CLAIM bytes for each."""
    count = len(leaves)
    message = UnixFS(type=Type.FILE, filesize=CLAIM * count, blocksizes=[CLAIM] * count)
    return dag.node([Link(leaf, b"", CLAIM) for leaf in leaves], message)


def assert_reads_are_eio(mount: Mounted, file: Cid) -> None:
    """A sequential reader gets EIO everywhere, and `prefetch` fails. Bytes that were fetched ahead do no
    harm."""
    with (mount.path / cids.text(file)).open("rb", buffering=0) as opened:
        for place in range(0, 10 * CLAIM, CLAIM):
            with pytest.raises(OSError) as raised:
                os.pread(opened.fileno(), CLAIM, place)
            assert raised.value.errno == errno.EIO
    assert mount.home.run("prefetch", cids.text(file), check=False).returncode == 1


def repository(folder: Path, dag: Dag) -> None:
    """A Kubo repository that holds the blocks of `dag`, and whose node does not run."""
    mount = {
        "mountpoint": "/blocks",
        "path": "blocks",
        "shardFunc": "/repo/flatfs/shard/v1/next-to-last/2",
        "type": "flatfs",
    }
    (folder / "blocks").mkdir(parents=True)
    (folder / "blocks" / "SHARDING").write_text(mount["shardFunc"] + "\n")
    (folder / "datastore_spec").write_text(json.dumps({"mounts": [mount], "type": "mount"}))
    for multihash, block in dag.blocks.items():
        name = cids.multihash_base32(cids.make(cids.RAW, multihash))
        (folder / "blocks" / name[-3:-1]).mkdir(exist_ok=True)
        with (folder / "blocks" / name[-3:-1] / f"{name}.data").open("wb") as file:
            file.write(block.rstrip(b"\0"))
            file.truncate(len(block))  # zeros take no space


def test_a_car_of_100000_roots_is_listed_and_does_not_delay_other_calls(home: Home) -> None:
    dag = Dag()
    good = dag.block(b"good")
    roots = [cids.make(cids.RAW, b"\x12\x20" + number.to_bytes(32)) for number in range(100_000)]
    path = home.folder / "roots.car"
    path.write_bytes(car.encode_header(roots) + car.section_head(good, 4) + b"good")
    with home.mounted("--from", path) as mount:
        listed = subprocess.run(
            ["sh", "-c", f"ls -f '{mount.path}' | grep -c bafk"], capture_output=True, text=True, timeout=600
        )
        assert listed.stdout.strip() == "100000"
        assert (mount.path / cids.text(good)).read_bytes() == b"good"
        assert mount.peak_memory() < MEMORY


def test_a_car_with_a_header_over_8_mib_is_refused(home: Home) -> None:
    roots = [cids.make(cids.RAW, b"\x12\x20" + bytes(32))] * 210_000
    (home.folder / "roots.car").write_bytes(car.encode_header(roots))
    home.refused("mount", "--from", home.folder / "roots.car", home.mountpoint, names="its header would have")


def test_a_file_whose_nodes_have_40000_links_each_is_read(home: Home) -> None:
    """As leaves they are too large for their links; as nodes they take some 10 MB each."""
    dag = Dag()
    leaf, count = dag.block(b"x" * 64), 43_000
    size = 64 * count + 1
    message = [
        UnixFS(type=Type.FILE, data=b"%c" % n, filesize=size, blocksizes=[64] * count) for n in range(40)
    ]
    nodes = [dag.node([Link(leaf, b"", 64)] * count, each) for each in message]
    small = dag.node(
        [Link(node, b"", 2) for node in nodes], UnixFS(type=Type.FILE, filesize=80, blocksizes=[2] * 40)
    )
    large = dag.node(
        [Link(node, b"", size) for node in nodes],
        UnixFS(type=Type.FILE, filesize=40 * size, blocksizes=[size] * 40),
    )
    with home.mounted("--from", dag.car(home.folder / "wide.car")) as mount:
        assert errno_of(mount.path / cids.text(small)) == "EIO"
        with (mount.path / cids.text(large)).open("rb", buffering=0) as file:
            for place in (0, 20 * size, 39 * size):
                assert os.pread(file.fileno(), 10, place) == b"%c" % (place // size) + b"x" * 9
        assert mount.peak_memory() < MEMORY


@pytest.mark.parametrize(
    ("count", "width", "listed"), [(39_000, 6, 5000), (9_000, 180, 9_000)], ids=["many entries", "whole"]
)
def test_forty_directories_of_2_mib_are_listed_at_once(
    home: Home, count: int, width: int, listed: int
) -> None:
    dag = Dag()
    leaf = dag.block(b"x")
    names = [f"{number:0{width}}" for number in range(count)]
    links = dagpb.encode([Link(leaf, name.encode(), 1) for name in names], None)
    folders = [
        dag.block(links + dagpb.encode([], unixfs.encode(UnixFS(Type.DIRECTORY, mtime=n))), cids.DAG_PB)
        for n in range(40)
    ]
    with home.mounted("--from", dag.car(home.folder / "forty.car")) as mount:

        def some_entries(folder: Cid) -> list[str]:
            with os.scandir(mount.path / cids.text(folder)) as entries:
                return [entry.name for entry in islice(entries, listed)]

        with ThreadPoolExecutor(len(folders)) as readers:
            for found in readers.map(some_entries, folders):
                assert found == names[:listed]
        assert (mount.path / cids.text(folders[0]) / names[-1]).read_bytes() == b"x"
        assert mount.peak_memory() < MEMORY


def test_a_directory_of_2_mib_is_listed_and_read(home: Home) -> None:
    dag = Dag()
    entries = {b"%05d" % number: (dag.block(b"%d" % number), 5) for number in range(40_000)}
    directory = dag.directory(entries)
    with mounted(home, dag) as (_gateway, mount):
        folder = mount.path / cids.text(directory)
        assert len(os.listdir(folder)) == len(entries)
        for number in range(0, 40, 2):
            assert (folder / f"{number:05}").read_bytes() == b"%d" % number
        assert mount.peak_memory() < MEMORY
