"""The jobs that are timed. Each runs a program as users do, or this module as a program, and returns
seconds."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

READERS = 8
READS_EACH = 250
PAGE = 4096

Prefix = tuple[str, ...]
"""The command that runs another one as the mount's user."""


def read(prefix: Prefix, path: Path) -> float:
    return _timed([*prefix, "dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"])


def ls(prefix: Prefix, path: Path) -> float:
    return _timed([*prefix, "ls", str(path)])


def ls_long(prefix: Prefix, path: Path) -> float:
    return _timed([*prefix, "ls", "-ln", str(path)])


def find(prefix: Prefix, path: Path) -> float:
    return _timed([*prefix, "find", str(path)])


def tar(prefix: Prefix, path: Path) -> float:
    """Writes to a pipe, since GNU tar reads nothing if it writes to /dev/null."""
    return _timed([*prefix, "sh", "-c", 'tar cf - -C "$0" . | cat > /dev/null', str(path)])


def first_byte(prefix: Prefix, path: Path) -> float:
    return _told(prefix, "first", path)


def random_reads(prefix: Prefix, path: Path) -> float:
    return _told(prefix, "random", path)


def _timed(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def _told(prefix: Prefix, job: str, path: Path) -> float:
    """Seconds by the program's own clock, without its start."""
    command = [*prefix, sys.executable, __file__, job, str(path)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _first(path: str) -> None:
    file = os.open(path, os.O_RDONLY)
    os.pread(file, 1, 0)
    os.close(file)


def _random(path: str) -> None:
    file = os.open(path, os.O_RDONLY)
    size = os.fstat(file).st_size

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(READS_EACH):
            os.pread(file, PAGE, chance.randrange(size // PAGE) * PAGE)

    readers = [threading.Thread(target=work, args=(number,)) for number in range(READERS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    os.close(file)


if __name__ == "__main__":
    started = time.perf_counter()
    {"first": _first, "random": _random}[sys.argv[1]](sys.argv[2])
    print(time.perf_counter() - started)
