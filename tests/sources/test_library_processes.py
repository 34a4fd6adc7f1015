"""Several processes use one library at once, and some of them are killed."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb
from ipfsfuse.errors import NotHere
from ipfsfuse.sources.local.library import Library, NewRoot
from tests.sources.libraries import add, dag, packs, parent, raw


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


def test_another_library_object_sees_adds_and_removals_at_once(library: Library) -> None:
    reader = Library(library.folder)
    blocks, others = dag(range(5)), dag(range(5, 9))
    assert reader.packs.find(cids.multihash(blocks[0][0])) is None
    add(library, blocks)
    assert reader.block(blocks[0][0]) == blocks[0][1]
    add(library, others)
    assert reader.block(others[-1][0]) == others[-1][1]
    assert list(reader.roots()) == [blocks[-1][0], others[-1][0]]
    library.remove(blocks[-1][0])
    assert list(reader.roots()) == [others[-1][0]]
    with pytest.raises(NotHere):
        reader.block(blocks[0][0])


def test_a_removal_keeps_the_blocks_that_a_running_add_needs(library: Library) -> None:
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


KILLED = """
import os, sys
from pathlib import Path
from ipfsfuse.sources.local.library import Library
from tests.sources.libraries import raw
writer = Library(Path(sys.argv[1])).open_writer()
writer.put(*raw(77, 3_000_000))
os.kill(os.getpid(), 9)
"""


def test_the_next_writer_removes_the_file_of_a_killed_one(library: Library) -> None:
    project = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", KILLED, str(library.folder)], cwd=project, check=False)
    assert [name for name in packs(library) if name.endswith(".tmp")]
    living = library.open_writer()
    living.put(*raw(5))
    assert len([name for name in packs(library) if name.endswith(".tmp")]) == 1
    add(library, dag(range(3)))
    assert len([name for name in packs(library) if name.endswith(".tmp")]) == 1, (
        "the file of a living writer was removed"
    )
    living.commit([NewRoot(raw(5)[0], "five", 1000)])
    assert len(library.roots()) == 2


WRITER = """
import sys
from pathlib import Path
from ipfsfuse.sources.local.library import Library
from tests.sources.libraries import add, dag
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
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(library.folder), str(1000 + n)], cwd=project)
        for n in range(4)
    ]
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    kept = {
        dag([*range(number, number + 10), 1000 + n])[-1][0] for number in range(0, 9, 3) for n in range(4)
    }
    assert set(library.roots()) == kept
    library.compact()
    for number in range(0, 9, 3):
        for n in range(4):
            for cid, block in dag([*range(number, number + 10), 1000 + n]):
                assert library.block(cid) == block


ENDLESS = """
import sys
from pathlib import Path
from ipfsfuse.sources.local.library import Library
from tests.sources.libraries import add, dag
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


def test_every_listed_root_is_whole_after_writers_were_killed(library: Library) -> None:
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
