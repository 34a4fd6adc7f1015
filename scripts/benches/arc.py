"""Hit rates of the cache's policy beside LRU, by requests and by bytes, on traces that tell policies apart.

    python scripts/benches/arc.py [--trace FILE]

FILE holds a trace as `trace` records it. Without one: traces that are made up, in a cache of 1 GiB, then
data/workday.trace (see data/workday.sh), in caches of some share of what it opens. Pure computation: the same
figures on every machine.
"""

import argparse
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from ipfsfuse.cache.arc import Arc

MIB = 1 << 20
CAPACITY = 1 << 30
REQUESTS = 60_000
WORKDAY = Path(__file__).parent / "data" / "workday.trace"
SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)


class Request(NamedTuple):
    key: str
    size: int


class Policy(Protocol):
    def request(self, key: str, size: int) -> bool:
        """Whether it was held."""
        ...


class Lru:
    def __init__(self, capacity: int) -> None:
        self._capacity, self._bytes = capacity, 0
        self._held: OrderedDict[str, int] = OrderedDict()

    def request(self, key: str, size: int) -> bool:
        if key in self._held:
            self._held.move_to_end(key)
            return True
        while self._bytes + size > self._capacity:
            self._bytes -= self._held.popitem(last=False)[1]
        self._held[key] = size
        self._bytes += size
        return False


class ArcPolicy:
    def __init__(self, capacity: int) -> None:
        self._arc: Arc[str] = Arc(capacity)

    def request(self, key: str, size: int) -> bool:
        if key in self._arc:
            self._arc.use(key)
            return True
        self._arc.admit(key, size)
        return False


def sizes(seed: int) -> Callable[[str], int]:
    """A size for each key: 64 KiB to 64 MiB, log-uniform, 9 MiB in the mean."""
    known: dict[str, int] = {}
    dice = random.Random(seed)
    return lambda key: known.setdefault(key, int(2 ** dice.uniform(16, 26)))


def keyed(keys: Iterable[str], seed: int) -> Iterator[Request]:
    size = sizes(seed)
    return (Request(key, size(key)) for key in keys)


def zipf(count: int, number: int, seed: int, exponent: float = 0.9) -> list[str]:
    dice = random.Random(seed)
    weights = list(itertools.accumulate(1 / rank**exponent for rank in range(1, count + 1)))
    return [f"zipf {key}" for key in dice.choices(range(count), cum_weights=weights, k=number)]


def loop(count: int, number: int) -> list[str]:
    return [f"loop {index % count}" for index in range(number)]


def scan(number: int) -> list[str]:
    return [f"scan {index}" for index in range(number)]


def interleaved(runs: int, *traces: list[str]) -> list[str]:
    """The traces in turn, each cut into `runs` pieces."""
    pieces = [
        [trace[len(trace) * run // runs : len(trace) * (run + 1) // runs] for trace in traces]
        for run in range(runs)
    ]
    return [key for turn in pieces for piece in turn for key in piece]


def traces(n: int = REQUESTS) -> dict[str, list[Request]]:
    """By name, each of about `n` requests."""
    return {
        "loop (a little larger than the cache)": list(keyed(loop(150, n), 1)),
        "loop that fits": list(keyed(loop(80, n), 1)),
        "scan (each once)": list(keyed(scan(n), 2)),
        "zipf 0.9": list(keyed(zipf(2000, n, 3), 3)),
        "zipf 0.7": list(keyed(zipf(2000, n, 4, 0.7), 4)),
        "zipf with scans": list(keyed(interleaved(60, zipf(1000, n // 2, 5), scan(n // 2)), 5)),
        "zipf with loops": list(keyed(interleaved(60, zipf(1000, n // 2, 6), loop(300, n // 2)), 6)),
        "popularity that moves": list(
            keyed([f"{era} {key}" for era in range(6) for key in zipf(1000, n // 6, 7 + era)], 7)
        ),
    }


def rates(policy: Policy, trace: Iterable[Request]) -> tuple[float, float]:
    """Hit rates by requests and by bytes, from 0 to 1."""
    hits = total = hit_bytes = total_bytes = 0
    for request in trace:
        held = policy.request(*request)
        hits, total = hits + held, total + 1
        hit_bytes, total_bytes = hit_bytes + held * request.size, total_bytes + request.size
    return hits / total, hit_bytes / total_bytes


def recorded(path: Path) -> list[Request]:
    """A key a line, its size in bytes where it comes first (`trace`)."""
    found: dict[str, int] = {}
    requests = []
    for line in path.read_text(encoding="ascii").splitlines():
        key, _, size = line.partition(" ")
        requests.append(Request(key, found.setdefault(key, int(size or 0))))
    return requests


def show(name: str, trace: list[Request], capacity: int) -> None:
    arc, lru = rates(ArcPolicy(capacity), trace), rates(Lru(capacity), trace)
    print(
        f"{name:40} "
        + " ".join(f"{100 * by_requests:6.1f} {100 * by_bytes:6.1f}" for by_requests, by_bytes in (arc, lru))
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="hit rates of ARC by bytes beside LRU")
    parser.add_argument("--trace", type=Path, default=WORKDAY, help="a recorded trace (see trace.py)")
    parser.add_argument(
        "--capacity",
        type=int,
        default=CAPACITY,
        help="bytes, for the traces that are made up (default: 1 GiB)",
    )
    arguments = parser.parse_args(argv)
    print(f"{'hit rate in %, by requests and by bytes':40} {'ARC':>13} {'LRU':>13}")
    if arguments.trace == WORKDAY:
        for name, trace in traces().items():
            show(name, trace, arguments.capacity)
    opened = recorded(arguments.trace)
    distinct = sum(dict(opened).values())
    print(
        f"{arguments.trace.name}: {len(opened)} opens of {len(dict(opened))} files, {distinct / MIB:.0f} MiB"
    )
    for share in SHARES:
        show(f"  a cache of {share:.0%} of that", opened, int(distinct * share))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
