"""Limits hold, and a limit that is no number is one line."""

from pathlib import Path
from subprocess import PIPE

import pytest

from ipfsfuse.errors import UsageError
from runner import limits
from runner.limits import Limits
from tests.mounting import PATIENCE
from tests.runner.conftest import DEMO, Runner

GROW = b'(module (memory 1) (func (export "_start") (if (i32.eq (memory.grow (i32.const 64)) (i32.const -1)) (then unreachable))))'


def test_parse() -> None:
    assert limits.parse(["timeout=1.5s,fuel=10", "max-memory-size=64MiB", "fuel=11"]) == Limits(timeout=1.5, fuel=11, max_memory_size=64 << 20)
    assert limits.parse(["timeout=2m,max-stdout=10kB"]) == Limits(timeout=120, max_stdout=10_000)


NO_LIMITS = """
    fuel=x fuel= fuel fuel=-1 fuel=1.5 fuel=99999999999999999999 timeout=soon timeout=0 timeout=-1s timeout=nan max-memory-size=1QB
    max-memory-size= memory=1 fuel=1,, max-open-files=3 max-wasm-stack=0 max-wasm-stack=1TiB
"""


@pytest.mark.parametrize("text", [*NO_LIMITS.split(), ""])
def test_no_number(text: str) -> None:
    with pytest.raises(UsageError):
        limits.parse([text])


def test_memory(run: Runner) -> None:
    assert run("-", stdin=GROW).returncode == 0
    assert run("-W", "max-memory-size=1MiB", "-", stdin=GROW).returncode == 134


def test_fuel(run: Runner, habits: Path) -> None:
    done = run("-W", "fuel=100000", habits, "spin")
    assert done.returncode == 134
    assert b"fuel" in done.stderr
    assert run("-W", "fuel=10000000", habits, "args").returncode == 0


@pytest.mark.parametrize("what", ["spin", "sleep"])
def test_time(run: Runner, habits: Path, what: str) -> None:
    done = run("-W", "timeout=300ms", habits, what)
    assert done.returncode == 124
    assert done.stderr.decode().splitlines() == [f"ipfsfuse-run: {habits} ran out of time after 0.3 s"]


def test_time_of_a_guest_that_waits_for_input(run: Runner, habits: Path) -> None:
    with run.start("-W", "timeout=300ms", habits, "cat", stdin=PIPE) as process:
        assert process.wait() == 124


def test_time_of_a_guest_whose_output_nobody_takes(run: Runner, habits: Path) -> None:
    with run.start("-W", "timeout=300ms,max-stdout=1GiB", habits, "flood", "1000000") as process:
        assert process.wait(timeout=PATIENCE) == 124


def test_open_files(run: Runner, habits: Path) -> None:
    done = run("-W", "max-open-files=40", habits, "open", "/ipfs/root/file")
    count, _errno, number = done.stdout.split()
    assert 0 < int(count) < 40
    assert int(number) in (29, 33, 41)  # wasi-libc's EMFILE is 33; wasmtime gives EIO where it knows none


def test_stdout(run: Runner, habits: Path) -> None:
    done = run("-W", "max-stdout=4500", habits, "flood", "1000000")
    assert (done.returncode, len(done.stdout)) == (134, 4500)
    assert run("-W", "max-stdout=100000", habits, "flood", "100000").returncode == 0


def test_stack(run: Runner) -> None:
    down = b"(func $down (param i32) (if (local.get 0) (then (call $down (i32.sub (local.get 0) (i32.const 1))))))"
    deep = b'(module %s (func (export "_start") (call $down (i32.const 400000))))' % down
    assert run("-", stdin=deep).returncode == 134
    assert run("-W", "max-wasm-stack=64MiB", "-", stdin=deep).returncode == 0
    assert run("-W", "max-wasm-stack=64MiB", DEMO / "reader-p2.wat", "/ipfs/root/file").returncode == 0


def test_tables_and_instances(run: Runner) -> None:
    table = b'(module (table 1000 funcref) (func (export "_start")))'
    assert run("-W", "max-table-elements=1000", "-", stdin=table).returncode == 0
    assert run("-W", "max-table-elements=999", "-", stdin=table).returncode == 1
    two = b'(module (memory 1) (memory 1) (table 1 funcref) (table 1 funcref) (func (export "_start")))'
    assert run("-W", "max-tables=2,max-memories=2", "-", stdin=two).returncode == 0
    assert run("-W", "max-tables=1", "-", stdin=two).returncode == 1
    assert run("-W", "max-memories=1", "-", stdin=two).returncode == 1


def test_instances_of_a_component(run: Runner) -> None:
    reader = DEMO / "reader-p2.wat"
    assert run("-W", "max-instances=2", reader, "/ipfs/root/file").returncode == 0
    assert run("-W", "max-instances=1", reader, "/ipfs/root/file").returncode == 1
