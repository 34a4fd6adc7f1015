"""A guest's arguments, streams, folders and exit codes are handled as wasmtime handles them."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest

from tests.mounting import PATIENCE
from tests.runner.conftest import DEMO, GUESTS, TOP, Runner, lines


def test_arguments_after_the_guest_are_passed_to_it(run: Runner, habits: Path) -> None:
    done = run("--env", "A=1", habits, "args", "--env", "B=2", "--", "-W", "x")
    assert lines(done.stdout) == ["habits.wasm", "args", "--env", "B=2", "--", "-W", "x"]


def test_argv0(run: Runner, habits: Path) -> None:
    assert lines(run("--argv0", "busybox", habits, "args").stdout)[0] == "busybox"


def test_a_guest_sees_only_given_variables_and_a_bare_name_inherits_its_value(
    run: Runner, habits: Path
) -> None:
    run.env["INHERITED"] = "from outside"
    done = run("--env", "A=1=2", "--env", "INHERITED", habits, "env")
    assert sorted(lines(done.stdout)) == ["A=1=2", "INHERITED=from outside"]


def test_streams_pass_through(run: Runner, habits: Path) -> None:
    data = bytes(range(256)) * 1000
    assert run(habits, "cat", stdin=data).stdout == data
    done = run(habits, "err")
    assert (done.stdout, done.stderr) == (b"", b"to stderr\n")


@pytest.mark.parametrize(
    ("argument", "code"),
    [(0, 0), (1, 1), (3, 3), (125, 125), (126, 126), (134, 134), (200, 200), (255, 255), (256, 1)],
)
def test_exit_codes_of_preview_1(run: Runner, habits: Path, argument: int, code: int) -> None:
    done = run(habits, "exit", str(argument))
    assert (done.returncode, done.stderr) == (code, b"")


def test_exit_code_of_a_component_that_fails(run: Runner) -> None:
    assert run(DEMO / "reader-p2.wat", "/ipfs/nothing/here").returncode == 1


def test_a_trap_gives_exit_code_134_and_a_backtrace(run: Runner, habits: Path) -> None:
    done = run(habits, "abort")
    assert done.returncode == 134
    assert b"wasm backtrace" in done.stderr
    assert b"unreachable" in done.stderr


def test_a_guest_is_read_from_standard_input_from_the_mount_and_as_text(
    run: Runner, habits: Path, tree: Path
) -> None:
    (tree / "root" / "guest.wasm").write_bytes(habits.read_bytes())
    assert lines(run("/ipfs/root/guest.wasm", "args").stdout) == ["guest.wasm", "args"]
    assert lines(run("-", "args", stdin=habits.read_bytes()).stdout) == ["-", "args"]
    # a pipe can't be read again from its start
    assert lines(run("/dev/stdin", "args", stdin=habits.read_bytes()).stdout) == ["stdin", "args"]
    assert run("-", stdin=b';; text\n(module (func (export "_start")))').returncode == 0
    assert len(run(GUESTS / "chance-p2.wat").stdout) == 72


def test_the_root_lists_what_was_given(run: Runner, habits: Path, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    assert sorted(lines(run(habits, "ls", "/").stdout)) == ["ipfs", "tmp"]
    done = run("--dir", f"{tmp_path}/given::/data", "--dir", f"{tmp_path}/given::/deep/er", habits, "ls", "/")
    assert sorted(lines(done.stdout)) == ["data", "deep", "ipfs", "tmp"]
    assert lines(run(habits, "ls", "/ipfs").stdout) == ["root"]


def test_the_root_can_not_be_written(run: Runner, habits: Path) -> None:
    assert run(habits, "write", "/new").returncode == 134  # fopen returned NULL, and fputs trapped
    assert sorted(lines(run(habits, "ls", "/").stdout)) == ["ipfs", "tmp"]


def test_a_given_folder_can_be_written_unless_it_is_ro(run: Runner, habits: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    assert run("--dir", f"{given}::/data", habits, "write", "/data/one").returncode == 0
    assert (given / "one").read_text() == "written\n"
    assert run("--dir", f"{given}::/data::ro", habits, "write", "/data/two").returncode != 0
    assert not (given / "two").exists()


def test_a_folder_has_its_host_path_if_no_other_is_given(run: Runner, habits: Path, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "a").touch()
    assert lines(run("--dir", tmp_path / "given", habits, "ls", tmp_path / "given").stdout) == ["a"]


def test_a_folder_whose_name_is_not_utf_8_can_be_given(run: Runner, habits: Path, tmp_path: Path) -> None:
    given = tmp_path / os.fsdecode(b"\xff")
    given.mkdir()
    (given / "a").touch()
    assert lines(run("--dir", f"{given}::/data", habits, "ls", "/data").stdout) == ["a"]


def test_the_working_directory(run: Runner, habits: Path) -> None:
    assert run("--cwd", "/ipfs/root", habits, "cat", "file").stdout == b"content\n"
    assert b"PWD=/ipfs/root\n" in run("--cwd", "/ipfs/root", habits, "env").stdout
    assert run("--cwd", "/ipfs/root", habits, "cat", "/ipfs/root/file").stdout == b"content\n"


def test_a_run_under_nohup_survives_the_end_of_its_terminal(run: Runner, habits: Path) -> None:
    command = ["nohup", *run.command("-W", "timeout=1s", habits, "spin")]
    with subprocess.Popen(
        command, env=run.env, cwd=TOP, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"spinning\n"
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(timeout=PATIENCE) == 124


def test_a_signal_ends_the_work_of_the_runner_after_the_guest(run: Runner, tmp_path: Path) -> None:
    """The runner may be writing a record, for example, which can take long."""
    guest = tmp_path / "guest.wat"
    guest.write_text('(module (func (export "_start")))')
    code = f"""if True:
        import os, signal
        from ipfsfuse_run import processes, supervisor
        from ipfsfuse_run.child import Plan
        from ipfsfuse_run.options import Options
        from ipfsfuse_run.sandbox import Sandbox
        processes.raise_on_signals()
        plan = Plan(Options({str(guest)!r}), "/", Sandbox(["guest"], [], [], None))
        assert supervisor.run(plan).code == 0
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except processes.Interrupted as exc:
            os._exit(exc.number)
        """
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=run.env, cwd=TOP, timeout=PATIENCE, check=False
        ).returncode
        == signal.SIGTERM
    )


def test_a_guest_killed_from_outside_gives_exit_code_137(run: Runner, habits: Path) -> None:
    with run.start(habits, "spin") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"spinning\n"
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert process.wait() == 137


@pytest.mark.parametrize("engine", ["auto", "library"])
@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_stream_that_the_caller_closed_is_empty(
    run: Runner, habits: Path, stream: int, engine: str
) -> None:
    command = ["sh", "-c", f'exec "$@" {stream}>&-', "sh", *run.command("--engine", engine, habits, "cat")]
    done = subprocess.run(command, env=run.env, cwd=TOP, input=b"", capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
