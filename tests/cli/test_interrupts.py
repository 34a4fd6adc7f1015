"""Commands that are interrupted or terminated leave nothing unfinished behind."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.mounting import PATIENCE, Home, wait_until

both = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_and_end(
    user: Home, arguments: Sequence[str | Path], begun: str, number: signal.Signals, fed: bytes = b""
) -> None:
    """Runs `ipfsfuse ARGUMENTS` with `fed` as its input, and sends it a signal once a file matches `begun`.
    Checks that it ends silently."""
    command = [sys.executable, "-m", "ipfsfuse", *map(str, arguments)]
    with subprocess.Popen(
        command, env=user.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin
        process.stdin.write(fed)
        process.stdin.flush()
        wait_until(lambda: any(user.folder.glob(begun)), "a file was begun")
        process.send_signal(number)
        assert process.wait(PATIENCE) == 128 + signal.SIGINT
        assert process.stderr
        assert process.stderr.read() == b""


@both
def test_an_add_that_is_ended_leaves_the_library_as_it_was(user: Home, number: signal.Signals) -> None:
    (user.folder / "first").write_bytes(os.urandom(100_000))
    user.add(user.folder / "first")
    before = files_below(user.library)
    # the input does not end
    run_and_end(user, ["add", "-"], "library/*.tmp", number, fed=os.urandom(20 << 20))
    assert files_below(user.library) == before


@both
def test_an_export_that_is_ended_leaves_no_file(user: Home, number: signal.Signals) -> None:
    with socket.socket() as silent:  # a gateway that never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        gateway = f"http://127.0.0.1:{silent.getsockname()[1]}"
        made = user.folder / "made.car"
        run_and_end(
            user,
            [
                "export",
                "--from",
                gateway,
                "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy",
                made,
            ],
            ".made.car.*",
            number,
        )
    assert not files_below(user.folder)


@both
def test_a_cat_whose_reader_reads_nothing_can_be_ended(user: Home, number: signal.Signals) -> None:
    (user.folder / "large").write_bytes(bytes(4 << 20))
    cid = user.add(user.folder / "large")
    command = [sys.executable, "-m", "ipfsfuse", "cat", cid]
    with subprocess.Popen(command, env=user.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        select.select([process.stdout], [], [], PATIENCE)  # it writes, and soon waits for its reader
        time.sleep(0.2)
        process.send_signal(number)
        assert process.wait(PATIENCE) == -number
        assert process.stderr
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("ipfsfuse", "argparse"), ("ipfsfuse", "ipfsfuse.errors"), ("ipfsfuse", "trio"),
        ("ipfsfuse_run", "argparse"), ("ipfsfuse_run", "ipfsfuse.errors"), ("ipfsfuse_run", "ipfsfuse_run.options"),
    ],
)  # fmt: skip
def test_ctrl_c_while_modules_are_imported_prints_nothing(user: Home, program: str, module: str) -> None:
    code = f"""if True:
        import os, runpy, signal, sys

        def hook(event, arguments):
            if event == "import" and arguments[0] == {module!r}:
                print("interrupted", flush=True)
                os.kill(os.getpid(), signal.SIGINT)

        sys.addaudithook(hook)
        sys.argv[1:] = ["cat", "bafkqaaa"] if {program!r} == "ipfsfuse" else ["run", "guest.wasm"]
        runpy.run_module({program!r}, run_name="__main__", alter_sys=True)
        """
    done = subprocess.run(
        [sys.executable, "-c", code], env=user.env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
    assert done.returncode in (128 + signal.SIGINT, -signal.SIGINT)  # a shell sees the same
