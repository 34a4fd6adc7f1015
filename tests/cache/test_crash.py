"""`kill -9` at any moment: a process that reads through a cache is killed again and again, and the next
process goes on with the cache."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import pytest
import trio

from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store.staging import PART
from ipfsfuse.dag import cid as cids
from tests.cache.standin import Chain, make_file, random_bytes, staged_items

READER = """
import json, os, random, sys
from pathlib import Path
import trio
from ipfsfuse.cache.store.folder import lock_folder
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.cache.base import FileRef
from tests.cache.standin import Chain, make_file, random_bytes

folder, budget, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def say(what, **more):
    os.write(1, (json.dumps([what, more]) + "\\n").encode())

async def main():
    chain = Chain()
    files = [make_file(chain, 900_000 + number, [1 << 16, 70_001][number % 2], number, number % 3 == 0) for number in range(12)]
    small = [FileRef(chain.add(random_bytes(10_000, 1000 + number)), 10_000) for number in range(60)]
    known = set(json.loads(sys.argv[4]))
    with lock_folder(folder) as held:
        async with PinsetCache.open(held.path, chain, budget) as cache:
            entries = cache.store.staging.entries.values()
            say("open", complete=sorted(cids.text(e.cid) for e in entries if e.complete),
                used=cache.statistics().used, disk=sum(p.lstat().st_blocks * 512 for p in (held.path, *held.path.rglob("*"))))
            for text in sorted(known):  # complete at the last kill, and still there: it is not fetched again
                file, leaves, content = next(item for item in files if cids.text(item[0].cid) == text)
                chain.asked.clear()
                if cache.store.staging.entries.get(file.cid):
                    got = b"".join([bytes(await cache.reader.leaf(file, leaf)) for leaf in leaves])
                    say("again", right=got == content, asked=len(chain.asked))
            dice = random.Random(seed)
            async def reader(number):
                await trio.sleep(0.001 * number)
                while True:
                    file, leaves, content = dice.choice(files)
                    for leaf in dice.choice([leaves, leaves[:3]]):
                        if bytes(await cache.reader.leaf(file, leaf)) != content[leaf.offset : leaf.offset + leaf.size]:
                            say("wrong")
                    one = dice.choice(small)
                    await cache.reader.leaf(one, Leaf(one.cid, 0, one.size))
                    if cache.statistics().used > budget:
                        say("over")
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(reader, number)
trio.run(main)
"""


class Run:
    """What one reader printed until it was killed."""

    def __init__(self, folder: Path, budget: int, seed: int, known: list[str], life: float) -> None:
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", READER, str(folder), str(budget), str(seed), json.dumps(known)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(life)
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()
        lines = [line for line in (first + rest).decode().splitlines(keepends=True) if line.endswith("\n")]
        self.printed: list[tuple[str, dict[str, object]]] = [tuple(json.loads(line)) for line in lines]
        self.errors = errors.decode()

    def all(self, verb: str) -> list[dict[str, object]]:
        return [details for each, details in self.printed if each == verb]


def complete_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "staging").iterdir() if not path.name.endswith(PART))


FILE = 1 << 20
"""A little more than the bytes on disk of the largest file that `READER` reads."""


@pytest.mark.slow
def test_the_cache_survives_fifty_kills(tmp_path: Path) -> None:
    """No byte is wrong, no complete file is fetched again, no file is left over, and the budget is kept."""
    dice = random.Random(7)
    folder, budget, known = tmp_path / "cache", 8 << 20, list[str]()
    again = 0
    for number in range(50):
        run = Run(folder, budget, number, known, dice.uniform(0.0, 0.5))
        (opened,) = run.all("open")
        assert "Traceback" not in run.errors
        assert int(str(opened["disk"])) <= int(str(opened["used"])) <= budget
        there = set(cast(list[str], opened["complete"]))
        assert there <= set(known)
        assert there == set(known) or int(str(opened["used"])) + FILE > budget, (
            "a complete file is gone only if it has no room beside the index"
        )
        assert run.all("wrong") == run.all("over") == []
        for one in run.all("again"):
            assert one == {"right": True, "asked": 0}
            again += 1
        known = complete_files(folder / "ipfsfuse-cache")
        names = {path.name for path in (folder / "ipfsfuse-cache").iterdir()}
        assert names <= {
            "format",
            "CACHEDIR.TAG",
            "pinned",
            "staging",
            "packs",
            "lock",
            "index.sqlite",
            "index.sqlite-wal",
        }
    assert again > 50


WRITER = """
import os, signal, sys
from pathlib import Path
import trio
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.dag import cid as cids
from tests.cache.standin import Chain, make_file, random_bytes

async def main():
    chain = Chain()
    async with PinsetCache.open(Path(sys.argv[1]), chain, 8 << 20) as cache:
        for number in range(100):
            await cache.reader.block(chain.add(random_bytes(3000, number)))
        os.kill(os.getpid(), signal.SIGKILL)
trio.run(main)
"""


def test_small_blocks_that_were_written_just_before_a_kill_are_there(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL

    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, 8 << 20) as cache:
            for number in range(100):
                block = random_bytes(3000, number)
                assert await cache.reader.block(chain.add(block)) == block
            assert chain.asked == []

    trio.run(main)


def test_an_empty_part_and_a_part_of_a_complete_file_are_discarded(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        file, leaves, _content = make_file(chain, 1 << 20, 1 << 18)
        other, others, _content = make_file(chain, 1 << 20, 1 << 18, seed=1)
        async with PinsetCache.open(tmp_path, chain, 16 << 20) as cache:
            for leaf in leaves:
                await cache.reader.leaf(file, leaf)
        whole = tmp_path / "staging" / cids.text(file.cid)
        part = whole.with_name(f"{whole.name}.part")
        part.write_bytes(random_bytes(1 << 19, 1))
        empty = tmp_path / "staging" / f"{cids.text(other.cid)}.part"
        empty.touch()
        async with PinsetCache.open(tmp_path, chain, 16 << 20) as cache:
            assert not part.exists()
            assert not empty.exists()
            await cache.reader.leaf(other, others[0])
            assert {kept.cid: (kept.size, kept.complete) for kept in staged_items(cache)} == {
                file.cid: (file.size, True),
                other.cid: (other.size, False),
            }

    trio.run(main)


def test_a_part_that_seems_complete_gets_its_final_name_once_each_leaf_is_verified(tmp_path: Path) -> None:
    """A crash may lose the end of a leaf, in the page in which the next leaf begins. Then the file has no
    hole that would show it."""

    async def main() -> None:
        chain = Chain()
        file, leaves, content = make_file(chain, 900_000, 70_001)
        whole = tmp_path / "staging" / cids.text(file.cid)
        part = whole.with_name(f"{whole.name}.part")
        async with PinsetCache.open(tmp_path, chain, 16 << 20) as cache:
            for leaf in leaves:
                await cache.reader.leaf(file, leaf)
        end = leaves[4].offset + leaves[4].size
        with whole.open("r+b") as disk:
            os.pwrite(disk.fileno(), bytes(end % 4096), end - end % 4096)
        whole.rename(part)
        chain.asked.clear()
        for some in (leaves[:1], leaves):
            async with PinsetCache.open(tmp_path, chain, 16 << 20) as cache:
                for leaf in some:
                    assert (
                        bytes(await cache.reader.leaf(file, leaf))
                        == content[leaf.offset : leaf.offset + leaf.size]
                    )
            assert (whole.exists(), part.exists()) == (some == leaves, some != leaves)
        assert chain.asked == [leaves[4].cid]

    trio.run(main)
