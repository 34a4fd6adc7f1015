"""Limits hold, and an invalid limit is refused in one line."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
import wasmtime

from ipfsfuse.errors import UsageError
from ipfsfuse_run import growth, limits
from ipfsfuse_run.limits import Limits
from tests.mounting import PATIENCE, wait_until
from tests.runner.conftest import DEMO, TOP, Runner

GROW = b'(module (memory 1) (func (export "_start") (if (i32.eq (memory.grow (i32.const 64)) (i32.const -1)) (then unreachable))))'


def test_limits_are_parsed() -> None:
    assert limits.parse(["timeout=1.5s,fuel=10", "max-memory-size=64MiB", "fuel=11"]) == Limits(
        timeout=1.5, fuel=11, max_memory_size=64 << 20
    )
    assert limits.parse(["timeout=2m,max-stdout=10kB"]) == Limits(timeout=120, max_stdout=10_000)


INVALID_LIMITS = """
    timeout=1e300 timeout=99999999999999999999999h timeout=367d timeout=9000h max-stdout=99999999999999TiB max-table-elements=9223372036854775808
    max-open-files=9999999999999999999 fuel=18446744073709551616 max-memory-size=9223372036854775808 fuel=٣
    fuel=x fuel= fuel fuel=-1 fuel=1.5 fuel=99999999999999999999 timeout=soon timeout=0 timeout=-1s timeout=nan max-memory-size=1QB
    max-memory-size= memory=1 fuel=1,, max-open-files=3 max-wasm-stack=0 max-wasm-stack=1TiB
"""


@pytest.mark.parametrize("text", [*INVALID_LIMITS.split(), ""])
def test_an_invalid_limit_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        limits.parse([text])


EXTREME_LIMITS = """
    max-table-elements=9223372036854775807 max-instances=0 max-memories=0 max-tables=9223372036854775807 fuel=18446744073709551615 fuel=0
    max-wasm-stack=1 max-wasm-stack=1GiB max-open-files=32 max-open-files=2147483647 max-memory-size=0 max-memory-size=9223372036854775807
    max-stdout=9223372036854775807,max-out=9223372036854775807 timeout=8784h,compile-timeout=8784h
"""


def test_the_smallest_and_the_largest_limits_cause_no_fault_of_the_runner(run: Runner) -> None:
    """wasmtime and the kernel accept every limit that the command line accepts, or one line says what they
    refuse."""
    for limit in EXTREME_LIMITS.split():
        done = run("-W", limit, "-", stdin=b'(module (func (export "_start")))')
        assert done.returncode in (0, 125, 134), (limit, done)
        assert b"fault of the runner" not in done.stderr, (limit, done)
        assert b"Traceback" not in done.stderr


def test_a_lack_of_memory_is_reported_in_one_line(run: Runner, habits: Path) -> None:
    for kibibytes in (200_000, 1_000_000):
        command = [
            "bash",
            "-c",
            f'ulimit -v {kibibytes}; exec "$@"',
            "bash",
            *run.command("-W", "max-wasm-stack=1GiB", habits, "args"),
        ]
        done = subprocess.run(command, env=run.env, cwd=TOP, stdin=DEVNULL, capture_output=True, check=False)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (125, b"", 1), done
        assert b"memory" in done.stderr or b"give a smaller -W max-wasm-stack" in done.stderr


def test_memory(run: Runner) -> None:
    assert run("-", stdin=GROW).returncode == 0
    assert run("-W", "max-memory-size=1MiB", "-", stdin=GROW).returncode == 134


def test_fuel(run: Runner, habits: Path) -> None:
    done = run("-W", "fuel=100000", habits, "spin")
    assert done.returncode == 134
    assert b"fuel" in done.stderr
    assert run("-W", "fuel=10000000", habits, "args").returncode == 0


@pytest.mark.parametrize("activity", ["spin", "sleep"])
def test_time(run: Runner, habits: Path, activity: str) -> None:
    done = run("-W", "timeout=300ms", habits, activity)
    assert done.returncode == 124
    assert done.stderr.decode().splitlines() == [f"ipfsfuse-run: {habits} ran out of time after 0.3 s"]


def test_time_of_a_guest_that_waits_for_input(run: Runner, habits: Path) -> None:
    with run.start("-W", "timeout=300ms", habits, "cat", stdin=PIPE) as process:
        assert process.wait() == 124


def test_time_of_a_guest_whose_output_is_not_read(run: Runner, habits: Path) -> None:
    with run.start("-W", "timeout=300ms,max-stdout=1GiB", habits, "flood", "1000000") as process:
        assert process.wait(timeout=PATIENCE) == 124


def test_open_files(run: Runner, habits: Path) -> None:
    done = run("-W", "max-open-files=40", habits, "open", "/ipfs/root/file")
    count, _errno, number = done.stdout.split()
    assert 0 < int(count) < 40
    # wasi-libc's EMFILE is 33; wasmtime gives EIO for an error that it does not know
    assert int(number) in (29, 33, 41)


def test_stdout(run: Runner, habits: Path) -> None:
    done = run("-W", "max-stdout=4500", habits, "flood", "1000000")
    assert (done.returncode, len(done.stdout)) == (134, 4500)
    assert run("-W", "max-stdout=100000", habits, "flood", "100000").returncode == 0


def test_stderr_is_bounded_as_stdout_is(run: Runner, tmp_path: Path) -> None:
    guest = tmp_path / "flood.wat"
    guest.write_text(FLOOD)
    done = run("-W", "max-stdout=1000", guest)
    assert (done.returncode, done.stdout) == (134, b"")
    assert len(done.stderr) < 1200
    assert done.stderr.startswith(b"x" * 1000)
    assert done.stderr.endswith(
        b"ipfsfuse-run: the guest wrote more than max-stdout=1000 to standard error\n"
    )


FLOOD = """(module (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 50000))
    (memory.fill (i32.const 64) (i32.const 120) (i32.const 50000))
    (loop (drop (call $write (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 16))) (br 0))))"""


def test_a_trap_is_reported_even_if_stderr_is_full(run: Runner, tmp_path: Path) -> None:
    """The runner prints the backtrace. It does not count for the limit, and its names can't control a
    terminal."""
    guest = tmp_path / "trap.wat"
    guest.write_text('(module (func $"\\1b[31mred\\n" unreachable) (func (export "_start") (call 0)))')
    done = run("-W", "max-stdout=0", guest)
    assert done.returncode == 134
    assert b"wasm backtrace" in done.stderr
    assert b"\\x1b[31mred" in done.stderr
    assert b"\x1b" not in done.stderr


@pytest.fixture
def given(tmp_path: Path) -> Path:
    given = tmp_path / "given"
    given.mkdir()
    return given


def test_one_file_in_a_writable_folder_is_bounded(run: Runner, habits: Path, given: Path) -> None:
    done = run("-W", "max-out=1MiB", "--dir", f"{given}::/data", habits, "fill", "/data/one", "2000000")
    assert (done.returncode, done.stdout) == (134, b"")
    assert (
        done.stderr.decode() == f"ipfsfuse-run: {habits} wrote more than max-out=1048576 bytes to one file\n"
    )
    assert (given / "one").stat().st_size == 1 << 20


def test_a_guest_and_its_watcher_that_end_together_are_reported_once(
    run: Runner, habits: Path, given: Path
) -> None:
    """A runner that was not scheduled for a while finds that both have ended."""
    guest = [habits, "fill-when", "/data/go", "/data/one", "2000000"]
    with run.start("-W", "max-out=1MiB", "--dir", f"{given}::/data", *guest) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: len(listed.read_text().split()) == 2, "the guest and its watcher run")
        os.kill(process.pid, signal.SIGSTOP)
        children = listed.read_text().split()
        assert len(children) == 2
        (given / "go").touch()
        for each in children:
            status = Path(f"/proc/{each}/status")
            wait_until(lambda status=status: "State:\tZ" in status.read_text(), f"process {each} ends")
        os.kill(process.pid, signal.SIGCONT)
        _stdout, stderr = process.communicate(timeout=PATIENCE)
    assert stderr.decode() in (  # whichever ended first
        f"ipfsfuse-run: {habits} wrote more than max-out=1048576 bytes to one file\n",
        f"ipfsfuse-run: {habits} made its writable folders grow by more than max-out=1048576 bytes\n",
    )
    assert process.returncode == 134


@pytest.mark.parametrize("habit", ["fills", "names", "folders"])
def test_the_growth_of_a_writable_folder_is_bounded(
    run: Runner, habits: Path, given: Path, habit: str
) -> None:
    """Many files, many names, and folders nested so deeply that no path reaches them."""
    done = run("-W", "max-out=8MiB", "--dir", f"{given}::/data", habits, habit, "/data")
    assert done.returncode == 134, done
    assert done.stderr.startswith(f"ipfsfuse-run: {habits} made ".encode())
    assert b"max-out" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_files_from_before_the_run_do_not_count(run: Runner, habits: Path, given: Path) -> None:
    (given / "large").write_bytes(bytes(4 << 20))
    (given / "folder").mkdir()
    for number in range(300):
        (given / "folder" / str(number)).touch()
    options = ["-W", "max-out=1MiB", "--dir", f"{given}::/data"]
    assert run(*options, habits, "fill", "/data/one", "900000").returncode == 0
    assert run(*options, habits, "fill", "/data/large", "900000").returncode == 0
    assert run(*options, "--dir", f"{given}::/again", habits, "fill", "/again/two", "900000").returncode == 0
    assert run("-W", "max-out=0", "--dir", f"{given}::/data::ro", habits, "args").returncode == 0


def test_the_growth_by_a_guest_that_ends_at_once_is_seen(run: Runner, given: Path, habits: Path) -> None:
    done = run(
        "-W", "max-out=1MiB", "--dir", f"{given}::/data", habits, "twice", "/data/a", "/data/b", "700000"
    )
    assert done.returncode == 134, done


def test_a_file_that_is_removed_during_the_measurement_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a guest that makes and removes one file all the time could write any number of others."""
    (tmp_path / "a").touch()
    (tmp_path / "b").write_bytes(bytes(100_000))
    real_scandir = os.scandir

    @contextmanager
    def scandir(folder: int) -> Iterator[Iterator["os.DirEntry[str]"]]:
        with real_scandir(folder) as entries:
            listed = sorted(entries, key=lambda each: each.name)
        (tmp_path / "a").unlink()
        yield iter(listed)

    monkeypatch.setattr(os, "scandir", scandir)
    assert growth.measure([str(tmp_path)]).size >= 100_000


def test_output_to_a_file_does_not_count_for_max_out(
    run: Runner, habits: Path, given: Path, tmp_path: Path
) -> None:
    with (tmp_path / "out").open("wb") as out:
        command = run.command("-W", "max-out=1MiB", "--dir", f"{given}::/data", habits, "flood", "3000000")
        assert subprocess.run(command, env=run.env, cwd=TOP, stdout=out, check=False).returncode == 0
    assert (tmp_path / "out").stat().st_size == 3_000_000


def test_a_compilation_that_takes_too_long_is_ended_with_125(run: Runner, tmp_path: Path) -> None:
    """A compilation has its own timeout, and does not count for the timeout of the run."""
    guest = slow(tmp_path, 3000)
    done = run("-W", "compile-timeout=20ms", guest)
    assert (done.returncode, len(done.stderr.splitlines())) == (125, 1), done
    assert b"was not compiled within 0.02s: give -W compile-timeout=TIME" in done.stderr
    assert not [
        each for each in (tmp_path / "xdg" / "ipfsfuse-run" / "code").iterdir() if each.suffix != ".part"
    ]
    done = run("-W", "timeout=1ms", slow(tmp_path, 200))
    assert done.returncode in (0, 124), done  # the compilation takes far longer, and does not count
    assert b"compile" not in done.stderr


def test_two_cold_starts_compile_once(run: Runner, tmp_path: Path) -> None:
    guest = slow(tmp_path, 1500)
    processes = [subprocess.Popen(run.command(guest), env=run.env, cwd=TOP, stdin=DEVNULL) for _ in range(2)]
    spent = []
    for each in processes:
        _pid, status, usage = os.wait4(each.pid, 0)
        each.returncode = os.waitstatus_to_exitcode(status)
        assert each.returncode == 0
        spent.append(usage.ru_utime + usage.ru_stime)
    assert min(spent) < max(spent) / 2, spent
    again = subprocess.Popen(run.command(guest), env=run.env, cwd=TOP, stdin=DEVNULL)
    _pid, status, usage = os.wait4(again.pid, 0)
    again.returncode = os.waitstatus_to_exitcode(status)
    assert usage.ru_utime + usage.ru_stime < max(spent) / 2
    assert [each.suffix for each in (tmp_path / "xdg" / "ipfsfuse-run" / "code").iterdir()] == [""]


def slow(folder: Path, functions: int) -> Path:
    """A guest that is quick to run and slow to compile."""
    body = "(local.set 0 (i32.add (local.get 0) (i32.mul (local.get 0) (i32.const {0}))))" * 60
    text = "".join(
        f"(func (param i32) (result i32) {body.format(number)} (local.get 0))" for number in range(functions)
    )
    guest = folder / f"slow{functions}.wasm"
    guest.write_bytes(bytes(wasmtime.wat2wasm(f'(module {text} (func (export "_start")))')))
    return guest


def test_stack(run: Runner) -> None:
    down = b"(func $down (param i32) (if (local.get 0) (then (call $down (i32.sub (local.get 0) (i32.const 1))))))"
    deep = b'(module %s (func (export "_start") (call $down (i32.const 400000))))' % down
    assert run("-", stdin=deep).returncode == 134
    assert run("-W", "max-wasm-stack=64MiB", "-", stdin=deep).returncode == 0
    assert run("-W", "max-wasm-stack=64MiB", DEMO / "reader-p2.wat", "/ipfs/root/file").returncode == 0


def test_tables_and_instances(run: Runner) -> None:
    table = b'(module (table 1000 funcref) (func (export "_start")))'
    assert run("-W", "max-table-elements=1000", "-", stdin=table).returncode == 0
    assert run("-W", "max-table-elements=999", "-", stdin=table).returncode == 125
    two = b'(module (memory 1) (memory 1) (table 1 funcref) (table 1 funcref) (func (export "_start")))'
    assert run("-W", "max-tables=2,max-memories=2", "-", stdin=two).returncode == 0
    assert run("-W", "max-tables=1", "-", stdin=two).returncode == 125
    assert run("-W", "max-memories=1", "-", stdin=two).returncode == 125


def test_instances_of_a_component(run: Runner) -> None:
    reader = DEMO / "reader-p2.wat"
    assert run("-W", "max-instances=2", reader, "/ipfs/root/file").returncode == 0
    assert run("-W", "max-instances=1", reader, "/ipfs/root/file").returncode == 125
