"""The library: what one process adds another reads, what is removed gives back what nobody else needs."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf, Link
from ipfsfuse.errors import NotFound, NotHere, StoreFailed
from ipfsfuse.sources import librarycompact
from ipfsfuse.sources.base import Run
from ipfsfuse.sources.library import Library, LibrarySource
from ipfsfuse.sources.librarywriter import NewRoot

Pairs = list[tuple[Cid, bytes]]


def multihash(block: bytes) -> bytes:
    return b"\x12\x20" + hashlib.sha256(block).digest()


def raw(seed: int, size: int = 1000) -> tuple[Cid, bytes]:
    block = random.Random(seed).randbytes(size)
    return cids.make(cids.RAW, multihash(block)), block


def parent(children: Pairs) -> tuple[Cid, bytes]:
    block = dagpb.encode([Link(cid, str(index).encode(), len(block)) for index, (cid, block) in enumerate(children)], b"\x08\x01")
    return cids.make(cids.DAG_PB, multihash(block)), block


def dag(seeds: range | list[int], size: int = 1000) -> Pairs:
    """Leaves and, last, the root above them."""
    leaves = [raw(seed, size) for seed in seeds]
    return [*leaves, parent(leaves)]


def add(library: Library, blocks: Pairs, name: str = "thing") -> int:
    """How many blocks were new."""
    with library.open_writer() as writer:
        new = sum(writer.put(cid, block) for cid, block in blocks)
        writer.commit([NewRoot(blocks[-1][0], name, sum(len(block) for _cid, block in blocks))])
    return new


def packs(library: Library) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in library.folder.iterdir() if path.suffix in (".car", ".tmp")}


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


def test_what_was_added_is_read(library: Library) -> None:
    blocks = dag(range(20))
    assert add(library, blocks) == 21
    assert [library.block(cid) for cid, _block in blocks] == [block for _cid, block in blocks]
    assert list(library.roots()) == [blocks[-1][0]]
    (entry,) = library.entries()
    assert (entry.name, entry.size) == ("thing", sum(len(block) for _cid, block in blocks))


def test_a_second_add_of_the_same_adds_nothing(library: Library) -> None:
    blocks = dag(range(20))
    add(library, blocks)
    before = {path: path.read_bytes() for path in library.folder.rglob("*") if path.is_file()}
    assert add(library, blocks, "other name") == 0
    assert {path: path.read_bytes() for path in library.folder.rglob("*") if path.is_file()} == before


def test_duplicates_within_an_add_are_stored_once(library: Library) -> None:
    blocks = [raw(1)] * 50 + [raw(2)]
    assert add(library, blocks) == 2


def test_another_library_object_sees_adds_and_removals_at_once(library: Library) -> None:
    reader = Library(library.folder)
    blocks, others = dag(range(5)), dag(range(5, 9))
    assert not reader.contains(cids.multihash(blocks[0][0]))
    add(library, blocks)
    assert reader.block(blocks[0][0]) == blocks[0][1]
    add(library, others)
    assert reader.block(others[-1][0]) == others[-1][1]
    assert list(reader.roots()) == [blocks[-1][0], others[-1][0]]
    library.remove(blocks[-1][0])
    assert list(reader.roots()) == [others[-1][0]]
    with pytest.raises(NotHere):
        reader.block(blocks[0][0])


def test_removing_the_only_root_gives_everything_back(library: Library) -> None:
    blocks = dag(range(20))
    add(library, blocks)
    library.remove(blocks[-1][0])
    assert packs(library) == {}
    assert list(library.roots()) == []
    with pytest.raises(NotFound):
        library.remove(blocks[-1][0])


def test_removal_takes_any_spelling(library: Library) -> None:
    leaf = raw(1)
    block = dagpb.encode([Link(leaf[0], b"", 1000)], b"\x08\x01")
    root = Cid(multihash(block))
    add(library, [leaf, (root, block)])
    assert list(library.roots()) == [root]
    library.remove(cids.canonical(root))
    assert list(library.roots()) == []


def test_removal_keeps_what_another_root_shares(library: Library) -> None:
    first, second = dag(range(20)), dag([*range(5), 100, 101])
    add(library, first)
    assert add(library, second) == 3  # two leaves and the root: the rest is there
    size = sum(packs(library).values())
    library.remove(first[-1][0])
    assert [library.block(cid) for cid, _block in second] == [block for _cid, block in second]
    assert sum(packs(library).values()) < size - 12 * 1000
    with pytest.raises(NotHere):
        library.block(first[10][0])
    library.remove(second[-1][0])
    assert packs(library) == {}


def test_a_root_below_a_root_survives_its_parent(library: Library) -> None:
    blocks = dag(range(20))
    add(library, blocks)
    add(library, [blocks[3]])
    assert len(packs(library)) == 1
    library.remove(blocks[-1][0])
    assert library.block(blocks[3][0]) == blocks[3][1]
    assert list(library.roots()) == [blocks[3][0]]


def test_nothing_is_removed_below_a_running_add(library: Library) -> None:
    blocks = dag(range(20))
    add(library, blocks)
    with Library(library.folder).open_writer() as writer:
        for cid, block in blocks[:5]:
            assert not writer.put(cid, block)
        library.remove(blocks[-1][0])
        assert library.block(blocks[0][0]) == blocks[0][1]
        top = parent(blocks[:5])
        writer.put(*top)
        writer.commit([NewRoot(top[0], "later", 5000)])
    assert [library.block(cid) for cid, _block in blocks[:5]] == [block for _cid, block in blocks[:5]]
    library.compact()
    assert library.block(blocks[0][0]) == blocks[0][1]
    with pytest.raises(NotHere):
        library.block(blocks[15][0])


def test_an_abandoned_add_leaves_no_trace(library: Library) -> None:
    add(library, dag(range(3)))
    before = packs(library)
    with library.open_writer() as writer:
        writer.put(*raw(77))
    assert packs(library) == before
    assert len(library.roots()) == 1


KILLED = """
import os, sys
from pathlib import Path
from ipfsfuse.sources.library import Library
from tests.sources.test_library import raw
writer = Library(Path(sys.argv[1])).open_writer()
writer.put(*raw(77, 3_000_000))
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_writer_left_is_swept_by_the_next(library: Library) -> None:
    project = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", KILLED, str(library.folder)], cwd=project, check=False)
    assert [name for name in packs(library) if name.endswith(".tmp")]
    living = library.open_writer()
    living.put(*raw(5))
    assert len([name for name in packs(library) if name.endswith(".tmp")]) == 1
    add(library, dag(range(3)))
    assert len([name for name in packs(library) if name.endswith(".tmp")]) == 1, "a living writer's file was swept"
    living.commit([NewRoot(raw(5)[0], "five", 1000)])
    assert len(library.roots()) == 2


def test_files_are_private(library: Library) -> None:
    add(library, dag(range(3)))
    for path in [library.folder, *library.folder.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    folder.mkdir()
    folder.chmod(0o770)
    with pytest.raises(StoreFailed, match="may be written by others"):
        Library(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(StoreFailed, match="another user"):
        Library(folder)


def test_the_source_gets_and_streams(library: Library) -> None:
    small, large = dag(range(300)), dag([1000, 1001, 1002], 1 << 20)
    add(library, small)
    add(library, large)
    leaves = [Leaf(cid, index, len(block)) for index, (cid, block) in enumerate([*small[:-1], raw(9999), *large[:-1]])]
    got: dict[int, bytes] = {}

    async def deliver(index: int, block: bytes) -> None:
        assert index not in got
        got[index] = block

    async def main() -> None:
        source = LibrarySource(library)
        assert await source.get(large[0][0]) == large[0][1]
        with pytest.raises(NotHere):
            await source.get(raw(9999)[0])
        await source.stream(Run(small[-1][0], 1, leaves), deliver)
        assert list(source.roots()) == [small[-1][0], large[-1][0]]
        await source.aclose()

    trio.run(main)
    expected = dict(enumerate(block for _cid, block in [*small[:-1], raw(9999), *large[:-1]]))
    del expected[300]
    assert got == expected


def test_many_small_packs_become_one(library: Library) -> None:
    everything = [dag([10 * number, 10 * number + 1, 5]) for number in range(librarycompact.MANY + 3)]
    reader = Library(library.folder)
    for blocks in everything:
        add(library, blocks)
        assert reader.block(blocks[0][0]) == blocks[0][1]
    library.remove(everything[1][-1][0])
    library.tidy()
    assert len(packs(library)) == 1
    del everything[1]
    for fresh in (Library(library.folder), reader):
        for blocks in everything:
            assert [fresh.block(cid) for cid, _block in blocks] == [block for _cid, block in blocks]
    for blocks in everything:
        library.remove(blocks[-1][0])
    assert packs(library) == {}


def test_a_damaged_pack_is_one_line(library: Library) -> None:
    blocks = dag(range(20))
    add(library, blocks)
    ((name, size),) = packs(library).items()
    os.truncate(library.folder / name, size // 2)
    with pytest.raises(NotHere):
        Library(library.folder).block(blocks[0][0])
    add(library, blocks)
    assert Library(library.folder).block(blocks[0][0]) == blocks[0][1]


WRITER = """
import sys
from pathlib import Path
from ipfsfuse.sources.library import Library
from tests.sources.test_library import add, dag
library = Library(Path(sys.argv[1]))
for number in range(9):
    blocks = dag([*range(number, number + 10), int(sys.argv[2])])
    add(library, blocks)
    assert [library.block(cid) for cid, _block in blocks] == [block for _cid, block in blocks]
    if number % 3:
        library.remove(blocks[-1][0])
    else:
        library.tidy()
"""


def test_several_processes_add_and_remove_at_once(library: Library) -> None:
    project = Path(__file__).parents[2]
    running = [subprocess.Popen([sys.executable, "-c", WRITER, str(library.folder), str(1000 + n)], cwd=project) for n in range(4)]
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    kept = {dag([*range(number, number + 10), 1000 + n])[-1][0] for number in range(0, 9, 3) for n in range(4)}
    assert set(library.roots()) == kept
    library.compact()
    for number in range(0, 9, 3):
        for n in range(4):
            for cid, block in dag([*range(number, number + 10), 1000 + n]):
                assert library.block(cid) == block


ENDLESS = """
import sys
from pathlib import Path
from ipfsfuse.sources.library import Library
from tests.sources.test_library import add, dag
library = Library(Path(sys.argv[1]))
print(flush=True)
number = int(sys.argv[2])
while True:
    blocks = dag([*range(number, number + 5), 1, 2, 3])
    add(library, blocks)
    if number % 2:
        library.remove(blocks[-1][0])
    number += 1
"""


def test_whoever_is_killed_every_listed_root_is_whole(library: Library) -> None:
    project = Path(__file__).parents[2]
    chance = random.Random(3)
    for attempt in range(5):
        command = [sys.executable, "-c", ENDLESS, str(library.folder), str(1000 * attempt)]
        with subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=chance.random() / 4)
            process.kill()
        fresh = Library(library.folder)
        for root in fresh.roots():
            for link in dagpb.decode(fresh.block(root)).links:
                cids.verify(link.cid, fresh.block(link.cid))
    library.compact()
    assert all(name.endswith(".car") for name in packs(library))
    for root in library.roots():
        library.remove(root)
    assert packs(library) == {}
