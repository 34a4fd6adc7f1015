"""Staging from a node's repository on the same file system, if that can share extents: no bytes are written,
and staged leaves are verified as always. On images of XFS and btrfs."""

import contextlib
import os
import random
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.sources.base import LeafRange, Verified
from ipfsfuse.sources.local.kubo_repo import Flatfs
from ipfsfuse.sources.streams import Delivery, Send
from ipfsfuse.structures import Buffer
from tests.cache.standin import Chain
from tests.dagging import Dag
from tests.faults.test_harm import repository
from tests.mounting import Home, Mounted, wait_until

MIB = 1 << 20
LEAVES = 44
TAIL = 12_345
"""Bytes of the last leaf: it ends within a block of the file system."""
WRONG = 40
"""The leaf that a test damages."""
MAKE = {
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q"],
}


@contextlib.contextmanager
def file_system(kind: str, folder: Path) -> Iterator[Path]:
    """A file system of that kind. Its image is a file in `folder`, and it is mounted there too."""
    command = MAKE[kind]
    if os.getuid() or shutil.which(command[0]) is None:
        pytest.skip(f"needs root and {command[0]}")
    image, place = folder / "image", folder / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    subprocess.run([*command, str(image)], check=True, stdout=subprocess.DEVNULL)
    made = subprocess.run(["mount", "-o", "loop", str(image), str(place)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no image of {kind} can be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        # A process that is ending may still be in it. The loop device goes with its last mount, and a mount
        # namespace that was made meanwhile also has one.
        wait_until(lambda: not subprocess.run(["umount", str(place)]).returncode, "it is unmounted")


@pytest.fixture(params=list(MAKE))
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with file_system(request.param, tmp_path) as place:
        yield place


class Content:
    """A file in a repository on `disk`, whose node does not run."""

    def __init__(self, disk: Path) -> None:
        dice, dag = random.Random(5), Dag()
        self.leaves = [*(dice.randbytes(MIB) for _ in range(LEAVES)), dice.randbytes(TAIL)]
        self.bytes = b"".join(self.leaves)
        self.cid = cids.text(dag.file(self.leaves))
        self.blocks = [cids.multihash_base32(dag.block(leaf)) for leaf in self.leaves]
        self.repository = disk / "repository"
        repository(self.repository, dag)
        self.home = Home(disk / "home")
        self.home.env["IPFS_PATH"] = str(self.repository)

    def block(self, number: int) -> Path:
        name = self.blocks[number]
        return self.repository / "blocks" / name[-3:-1] / f"{name}.data"

    @property
    def staged(self) -> Path:
        return self.home.store / "staging" / self.cid

    def read(self, mount: Mounted) -> bytes:
        return (mount.path / self.cid).read_bytes()


def used(disk: Path) -> int:
    os.sync()
    info = os.statvfs(disk)
    return (info.f_blocks - info.f_bfree) * info.f_frsize


@pytest.mark.logs("wrong bytes in the cache")
def test_staged_leaves_share_the_repositorys_extents(disk: Path) -> None:
    """Neither side changes the other: a write into one of two files that share extents goes to new blocks."""
    content = Content(disk)
    with content.home.mounted("--from", "kubo") as mount:
        before = used(disk)
        assert content.read(mount) == content.bytes
        wait_until(content.staged.exists, "the file is whole")
        # leaves that were read before read-ahead began are copied: on a busy machine more of them
        assert used(disk) - before < len(content.bytes) // 4
        status = mount.status()
        assert status["cache"]["used"] > len(content.bytes), "shared extents count in the budget"
        assert status["sources"][0]["blocks"] >= LEAVES
        with content.staged.open("r+b") as file:
            file.seek(30 * MIB)
            file.write(bytes(4096))
        Path("/proc/sys/vm/drop_caches").write_text("1")
        assert content.read(mount) == content.bytes, "the wrong leaf is dropped and fetched again"
        for number in (20, 21):
            with content.block(number).open("r+b") as file:
                file.write(bytes(4096))
        Path("/proc/sys/vm/drop_caches").write_text("1")
        assert content.read(mount) == content.bytes
        assert mount.status()["cache"]["misses"] == 1 + LEAVES + 1 + 1, (
            "the root, each leaf, and one leaf again"
        )
        content.home.run("evict", content.cid)
        assert not content.staged.exists()
    for number in (0, 30, 40, LEAVES):
        assert content.block(number).read_bytes() == content.leaves[number]


@pytest.mark.logs(".")
def test_cloned_leaves_are_hashed_and_a_wrong_block_is_never_given(disk: Path) -> None:
    content = Content(disk)
    with content.block(WRONG).open("r+b") as file:
        file.seek(1000)
        file.write(bytes([content.leaves[WRONG][1000] ^ 1]))
    with content.home.mounted("--from", "kubo", "--deadline", "10s") as mount:
        with (mount.path / content.cid).open("rb") as reader:
            for number, leaf in enumerate(content.leaves):
                if number == WRONG:
                    with pytest.raises(OSError):
                        reader.read(len(leaf))
                    reader.seek((WRONG + 1) * MIB)
                else:
                    assert reader.read(len(leaf)) == leaf
        (kept,) = content.home.json("ls", "--json")["entries"]
        assert not kept["complete"], "the wrong leaf was never verified"
        assert not content.staged.exists()


class Repository(Chain):
    """Sends leaves from a repository, like the source for a node. The leaves are right."""

    def __init__(self, blocks: Path) -> None:
        super().__init__()
        self._files = Flatfs(blocks, 2)

    async def _send_leaves(self, wanted: LeafRange, send: Send[Verified]) -> None:
        source = self.source

        class Verify(Send[Delivery]):
            def __init__(self) -> None:
                pass

            async def send(self, value: Delivery) -> None:
                await send.send(Verified(value.first, value.blocks, source, value.release))

        assert await self._files.send_leaves(wanted, Verify(), source.name) == len(wanted.leaves)


def test_cloned_leaves_stay_in_memory_only_while_they_are_in_flight(disk: Path) -> None:
    content = Content(disk)
    (folder := disk / "cache").mkdir(mode=0o700)
    leaves = [
        Leaf(cids.make(cids.RAW, multihash), number * MIB, len(leaf))
        for number, leaf in enumerate(content.leaves)
        for multihash in [cids.multihash(Dag().block(leaf))]
    ]
    buffers: list[weakref.ref[object]] = []
    most = 0

    def arrived(leaf: Leaf, content_of_leaf: Buffer) -> None:
        nonlocal most
        assert content_of_leaf == content.leaves[leaf.offset // MIB]
        buffers.append(weakref.ref(memoryview(content_of_leaf).obj))
        most = max(most, sum(buffer() is not None for buffer in buffers))

    async def main() -> None:
        async with PinsetCache.open(folder, Repository(content.repository / "blocks"), 200 * MIB) as cache:
            file = FileRef(cids.parse(content.cid), len(content.bytes))
            await cache.reader.ahead(file, leaves, arrived)
            assert cache.store.staging.shares, "nothing was copied"

    trio.run(main)
    assert len(buffers) == len(leaves)
    assert most < 30, "the first leaves are gone when the last ones arrive"
