"""A mount in long use: memory, threads and descriptors do not grow after the first tenth of the time."""

import os
import random
import threading
import time
from pathlib import Path

from ipfsfuse.dag import cid as cids
from ipfsfuse.sources.http.settings import HttpSettings
from tests.dagging import Dag
from tests.faults.gateway import Gateway
from tests.mounting import Home, Mounted

SECONDS = float(os.environ.get("IPFSFUSE_SOAK", "8"))
READERS = 4
BUDGET = "24MiB"
"""Less than all content, so files are evicted again and again."""
MIB = 1 << 20
MEMORY, THREADS, DESCRIPTORS = 24 * MIB, 8, 8 + HttpSettings().idle_connections
"""The growth that is allowed after the first tenth: worker threads and idle connections come and go."""


def test_memory_threads_and_descriptors_do_not_grow_with_use(home: Home) -> None:
    """IPFSFUSE_SOAK sets the number of seconds."""
    dag, dice = Dag(), random.Random(11)
    contents = {f"large{number}": dice.randbytes(2 * MIB + number) for number in range(20)}
    contents |= {f"small{number}": dice.randbytes(dice.randrange(1, 50_000)) for number in range(400)}
    entries = {
        name.encode(): (
            dag.file([content[at : at + MIB] for at in range(0, len(content), MIB)]),
            len(content),
        )
        for name, content in contents.items()
    }
    root = cids.text(dag.directory(entries))
    with (
        Gateway(dag.blocks).serving() as gateway,
        home.mounted("--from", gateway.url, "--budget", BUDGET) as mount,
    ):
        ended, failures, reads = threading.Event(), list[str](), [0] * READERS

        def use(number: int) -> None:
            chance, names = random.Random(number), list(contents)
            while not ended.is_set() and not failures:
                name = chance.choice(names)
                path = mount.path / root / name
                match chance.randrange(4):
                    case 0:
                        right = path.read_bytes() == contents[name]
                    case 1:
                        at = chance.randrange(len(contents[name]))
                        with path.open("rb", buffering=0) as file:
                            right = os.pread(file.fileno(), 4096, at) == contents[name][at : at + 4096]
                    case 2:
                        right = path.stat().st_size == len(contents[name])
                    case _:
                        right = len(os.listdir(path.parent)) == len(contents)
                if not right:
                    failures.append(name)
                reads[number] += 1

        for name in contents:
            assert (mount.path / root / name).read_bytes() == contents[name]
        readers = [threading.Thread(target=use, args=(number,)) for number in range(READERS)]
        for reader in readers:
            reader.start()
        try:
            time.sleep(SECONDS / 10)
            first = resources_of(mount)
            time.sleep(SECONDS * 9 / 10)
        finally:
            ended.set()
            for reader in readers:
                reader.join()
        last = resources_of(mount)
        assert not failures
        assert sum(reads) > 10 * SECONDS, reads
        status = mount.status()
        assert status["cache"]["used"] <= 24 * MIB
        assert status["cache"]["evictions"] > 0
    growth = [after - before for before, after in zip(first, last, strict=True)]
    assert growth[0] <= MEMORY + (MEMORY if SECONDS < 60 else 0), (first, last)
    assert growth[1] <= THREADS, (first, last)
    assert growth[2] <= DESCRIPTORS, (first, last)


def resources_of(mount: Mounted) -> tuple[int, int, int]:
    """The daemon's resident bytes, threads and open descriptors."""
    process = Path(f"/proc/{mount.pid}")
    lines = (process / "status").read_text().splitlines()
    memory = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))
    return memory, len(os.listdir(process / "task")), len(os.listdir(process / "fd"))
