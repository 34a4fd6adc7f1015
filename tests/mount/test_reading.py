"""Reads: the bytes are right for every pattern, and few other blocks are fetched."""

import hashlib
import mmap
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ipfsfuse import client
from ipfsfuse.dag import cid as cids
from tests.cache.standin import flip
from tests.dagging import Dag
from tests.faults.gateway import Gateway, blocks_of, mounted
from tests.mount.conftest import Sample
from tests.mounting import Home, wait_until


@pytest.fixture
def big(sample: Sample) -> tuple[Path, bytes]:
    return sample.root / "big.bin", (sample.source / "big.bin").read_bytes()


def test_random_reads_and_reads_over_the_end(big: tuple[Path, bytes]) -> None:
    path, data = big
    rng = random.Random(1)
    with path.open("rb", buffering=0) as file:
        for _ in range(300):
            offset, size = rng.randrange(len(data) + 10_000), rng.randrange(1, 300_000)
            assert os.pread(file.fileno(), size, offset) == data[offset : offset + size]
        assert os.pread(file.fileno(), 10, len(data)) == b""
        assert os.pread(file.fileno(), 10, 1 << 50) == b""


def test_one_byte_at_a_time(sample: Sample) -> None:
    with (sample.root / "hello.txt").open("rb", buffering=0) as file:
        assert [file.read(1) for _ in range(7)] == [b"h", b"e", b"l", b"l", b"o", b"\n", b""]


def test_mmap(big: tuple[Path, bytes]) -> None:
    path, data = big
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert view[3_000_000:3_000_100] == data[3_000_000:3_000_100]
        assert hashlib.sha256(view).digest() == hashlib.sha256(data).digest()


def test_sendfile(big: tuple[Path, bytes], tmp_path: Path) -> None:
    path, data = big
    with path.open("rb") as file, (tmp_path / "out").open("wb") as out:
        sent = 0
        while count := os.sendfile(out.fileno(), file.fileno(), sent, len(data)):
            sent += count
    assert (tmp_path / "out").read_bytes() == data


def test_empty_files_and_symlinks(sample: Sample) -> None:
    assert (sample.root / "empty").read_bytes() == b""
    assert os.readlink(sample.root / "link") == "hello.txt"
    assert (sample.root / "link").read_text() == (sample.root / "up").read_text() == "hello\n"
    assert os.readlink(sample.root / "outside") == "/etc/hostname"
    assert not (sample.root / "dangling").exists()


def test_a_file_open_in_100_processes(big: tuple[Path, bytes]) -> None:
    path, data = big
    script = "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"

    def run(_number: int) -> str:
        command = [sys.executable, "-S", "-c", script, path]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    with ThreadPoolExecutor(100) as pool:
        assert set(pool.map(run, range(100))) == {hashlib.sha256(data).hexdigest()}


def test_the_first_byte_of_a_large_file_costs_the_path_and_one_leaf(home: Home) -> None:
    large = home.folder / "large"
    with large.open("wb") as out:
        for number in range(64):
            out.write(bytes([number]) * (1 << 20))
    cid = home.add(large)
    record = home.folder / "record"
    with home.mounted("--record", record) as mount:
        assert (
            subprocess.run(["head", "-c1", mount.path / cid], capture_output=True, check=True).stdout == b"\0"
        )
        used = record.read_text().splitlines()
    assert len(used) == 2, used


def test_a_tree_is_read_again_offline_after_unmount(home: Home, sample: Sample) -> None:
    car = home.folder / "content.car"
    sample.mount.home.run("export", sample.cid, car)
    gateway = Gateway(blocks_of(car))
    with gateway.serving():
        for options in (["--from", gateway.url], ["--offline"]):
            gateway.asked.clear()
            with home.mounted(*options) as mount:
                command = ["diff", "-r", "--no-dereference", sample.source, mount.path / sample.cid]
                compared = subprocess.run(command, capture_output=True, text=True)
                assert (compared.returncode, compared.stdout, compared.stderr) == (0, "", "")
            assert bool(gateway.asked) == (options != ["--offline"])


def test_random_reads_are_right_after_flips_and_eviction_of_the_staging_file(home: Home) -> None:
    """Most of the reads are answered without Python. A read that reaches Python is verified whole, or fetched
    again. The file is so large that random reads are not taken for sequential ones."""
    dag, dice = Dag(), random.Random(7)
    leaves = [dice.randbytes(1 << 20) for _ in range(24)]
    cid, content = dag.file(leaves), b"".join(leaves)
    with mounted(home, dag) as (gateway, mount):
        path, staged = mount.path / cids.text(cid), home.store / "staging" / cids.text(cid)
        assert path.read_bytes() == content
        wait_until(staged.exists, "it is staged")

        def read_by_python() -> int:
            return sum(client.call(mount.control, "metrics")["operations"]["read"]["counts"])

        with path.open("rb", buffering=0) as file:

            def read_randomly(times: int, flips: bool) -> None:
                for _ in range(times):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    at = dice.randrange(len(content) - 4096)
                    if flips:
                        flip(staged, dice.randrange(at, at + 4096))
                    assert os.pread(file.fileno(), 4096, at) == content[at : at + 4096]

            read_randomly(200, flips=False)
            before, asked = read_by_python(), sum(gateway.asked.values())
            read_randomly(500, flips=False)
            assert read_by_python() - before < 50
            assert sum(gateway.asked.values()) == asked
            read_randomly(100, flips=True)
            assert sum(gateway.asked.values()) > asked
            client.call(mount.control, "evict", cid=cids.text(cid))
            read_randomly(50, flips=False)
