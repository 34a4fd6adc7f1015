"""Damage to the cache folder of a running mount costs time, but gives no wrong byte."""

import os
import random
from pathlib import Path

from ipfsfuse.dag import cid as cids
from tests.dagging import Dag
from tests.faults.gateway import mounted
from tests.mounting import Home


def flip(folder: Path, count: int, rng: random.Random) -> None:
    """Flips `count` random bits in the files below `folder`."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    for _ in range(count):
        path = rng.choice(files)
        with path.open("r+b") as file:
            place = rng.randrange(path.stat().st_size)
            file.seek(place)
            old = file.read(1)[0]
            file.seek(place)
            file.write(bytes([old ^ 1 << rng.randrange(8)]))


def drop_pages(path: Path) -> None:
    """Drops a file's pages from the page cache, so that the next read reaches the mount."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_bit_flips_on_disk_never_reach_a_reader(home: Home) -> None:
    rng = random.Random(7)
    dag = Dag()
    contents = {b"large": b"".join(leaves := [rng.randbytes(1 << 20) for _ in range(6)])}
    entries = {b"large": (dag.file(leaves), 6 << 20)}
    for number in range(40):
        data = rng.randbytes(20_000)
        contents[b"s%02d" % number] = data
        entries[b"s%02d" % number] = (dag.block(data), len(data))
    root = dag.directory(entries)
    with mounted(home, dag) as (gateway, mount):
        folder = mount.path / cids.text(root)

        def read_all() -> None:
            for name, data in contents.items():
                drop_pages(folder / os.fsdecode(name))
                assert (folder / os.fsdecode(name)).read_bytes() == data

        read_all()
        read_all()  # by now, all leaves are written
        once = sum(gateway.asked.values())
        read_all()
        assert sum(gateway.asked.values()) == once, "everything is read from the cache"
        for _ in range(5):
            flip(home.store / "staging", 40, rng)
            flip(home.store / "packs", 40, rng)
            read_all()
        assert sum(gateway.asked.values()) > once + 40, "wrong leaves are fetched again"
