"""Bad input gives one line on standard error that names the cause, the exit code 125 or 2, and no
traceback."""

import re
from pathlib import Path

import pytest

from ipfsfuse_run.limits import Limits
from tests.runner.conftest import Runner

GUEST = b'(module (func (export "_start")))'


def refusal(run: Runner, code: int, *args: str | Path, stdin: bytes = b"") -> str:
    done = run(*args, stdin=stdin)
    message_lines = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout, len(message_lines)) == (code, b"", 1), done
    assert message_lines[0].startswith("ipfsfuse-run: ")
    return message_lines[0]


BAD_GUESTS = {
    "it is not WebAssembly": (b"\x7fELF\x02\x01\x01", "not WebAssembly"),
    "it is empty": (b"", "not WebAssembly"),
    "it is a script": (b"#!/bin/sh\nexit 0\n", "not WebAssembly"),
    "it ends within the header": (b"\0asm\1\0", "cut short"),
    "it is truncated": (b"\0asm\1\0\0\0\1\5", "unexpected end"),
    "a component is truncated": (b"\0asm\x0d\0\1\0\1\5", "out of bounds"),
    "its version is unknown": (b"\0asm\7\0\0\0", "version"),
    "its text is wrong": (b"(module (func", "text"),
    "it is a library": (b'(module (func (export "add")))', "exports no _start"),
    "it is an empty module": (b"(module)", "exports no _start"),
    "its start is not a function": (
        b'(module (global (export "_start") i32 (i32.const 0)))',
        "not a function",
    ),
    "an unknown import": (
        b'(module (import "env" "magic" (func)) (func (export "_start")))',
        "env::magic",
    ),
    "a WASI import of a wrong type": (
        b'(module (import "wasi_snapshot_preview1" "fd_close" (func)) (func (export "_start")))',
        "fd_close",
    ),
    "a component without exports": (b"(component)", "exports nothing"),
    "a component that serves HTTP": (
        b'(component (instance $i) (export "wasi:http/incoming-handler@0.2.0" (instance $i)))',
        "incoming-handler",
    ),
    "a component with an unknown import": (
        b'(component (import "acme:db/store@1.0.0" (instance (export "f" (func)))) (instance $i) (export "wasi:cli/run@0.2.0" (instance $i)))',
        "acme:db/store",
    ),
    "preview 3": (b'(component (import "wasi:cli/stdout@0.3.0" (instance)))', "preview 3"),
    "preview 3's run": (
        b'(component (instance $i) (export "wasi:cli/run@0.3.0-rc-2025-09-16" (instance $i)))',
        "preview 3",
    ),
}


@pytest.mark.parametrize("fault", BAD_GUESTS)
def test_a_guest_that_can_not_run_is_refused(run: Runner, fault: str) -> None:
    code, named = BAD_GUESTS[fault]
    assert named in refusal(run, 125, "-", stdin=code)


def test_a_guest_that_can_not_be_read_is_refused(run: Runner, tree: Path) -> None:
    assert "nowhere.wasm" in refusal(run, 125, "nowhere.wasm")
    assert "Is a directory" in refusal(run, 125, tree)
    assert "/ipfs/root/none" in refusal(run, 125, "/ipfs/root/none")
    assert "leads out of" in refusal(run, 125, "/ipfs/root/out")
    assert "leads out of" in refusal(run, 125, "/ipfs/../outside")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--unknown", "guest.wasm"], "--unknown"),
        (["-g", "guest.wasm"], "-g"),
        (["-S", "inherit-network", "guest.wasm"], "-S inherit-network: a guest gets no network"),
        (["-S", "cli,http", "guest.wasm"], "-S http: a guest gets no network"),
        (["-S", "cli=n", "guest.wasm"], "-S cli=n"),
        (["-C", "compiler=winch", "guest.wasm"], "-C compiler=winch"),
        (["-W", "simd=n", "guest.wasm"], "-W simd"),
        (["-W", "fuel=much", "guest.wasm"], "-W fuel: 'much'"),
        (["-W", "guest.wasm"], "guest.wasm"),
        (["--env", "=x", "guest.wasm"], "--env"),
        (["--env", "NOT_SET_ANYWHERE", "guest.wasm"], "NOT_SET_ANYWHERE"),
        (["--dir", "/tmp::/a::rx", "guest.wasm"], "/tmp::/a::rx"),
        (["--dir", "/tmp::../up", "guest.wasm"], "../up"),
        *((["--dir", f"/tmp::{name}", "guest.wasm"], "/ipfs") for name in ("/ipfs/x", "//ipfs", "ipfs")),
        (["guest.wasm", "\udcff"], "UTF-8"),
        (["--env", "A=\udcff", "guest.wasm"], "UTF-8"),
        (["--cwd", "relative", "guest.wasm"], "relative"),
        (["--cwd", "/ipfs/\udcff", "guest.wasm"], "UTF-8"),
        (["--dir", "/tmp::/\udcff", "guest.wasm"], "UTF-8"),
        (["--isolated", "guest.wasm"], "--isolated"),
        (["--from", "library", "guest.wasm"], "--from"),
        (["--deterministic", "guest.wasm"], "--deterministic"),
        ([], "GUEST"),
    ],
)
def test_a_usage_error_is_refused(run: Runner, args: list[str], named: str) -> None:
    assert named in refusal(run, 2, *args)


def test_an_unusable_working_directory_is_refused(run: Runner, tree: Path) -> None:
    (tree / "root" / "away").symlink_to("/etc")
    assert "/elsewhere" in refusal(run, 125, "--cwd", "/ipfs/elsewhere", "-", stdin=GUEST)
    assert "Not a directory" in refusal(run, 125, "--cwd", "/ipfs/root/file", "-", stdin=GUEST)
    assert "/ipfs/root/out" in refusal(run, 125, "--cwd", "/ipfs/root/out", "-", stdin=GUEST)
    assert "/ipfs/root/away leads out of" in refusal(run, 125, "--cwd", "/ipfs/root/away", "-", stdin=GUEST)


def test_a_mount_that_does_not_exist_is_refused(run: Runner, tmp_path: Path) -> None:
    run.mount = tmp_path / "nowhere"
    assert "nowhere" in refusal(run, 125, "-", stdin=GUEST)


@pytest.mark.parametrize("folder", ["/nowhere", "/etc/passwd"])
def test_an_unusable_folder_is_refused(run: Runner, folder: str) -> None:
    assert folder in refusal(run, 125, "--dir", folder, "-", stdin=GUEST)


def test_a_cache_folder_that_others_may_write_is_refused(run: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "xdg" / "ipfsfuse-run"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert str(folder) in refusal(run, 125, "-", stdin=GUEST)


def test_text_from_outside_can_not_control_a_terminal(run: Runner, tree: Path, tmp_path: Path) -> None:
    """Such text is in names, in arguments, and in what the mount says of them."""
    evil = "\x1b[2J\x1b]0;title\x07\nipfsfuse-run: all is well\u202e"
    (tree / "root" / f"{evil}.wasm").write_bytes(b"junk")
    messages = [
        refusal(run, 125, f"/ipfs/root/{evil}.wasm"),
        refusal(run, 125, f"nowhere{evil}"),
        refusal(run, 2, f"--{evil.replace(' ', '')}", "guest.wasm"),
        refusal(run, 2, "-W", f"{evil}=1", "guest.wasm"),
        refusal(run, 125, "--dir", f"/nowhere{evil}::/data", "-", stdin=GUEST),
        refusal(run, 125, "--cwd", f"/ipfs/{evil}", "-", stdin=GUEST),
    ]
    run.mount = None
    messages.append(refusal(run, 1, "inspect", tmp_path / f"{evil}.car"))
    messages.append(refusal(run, 2, "--from", f"/nowhere/{evil}.car", "-", stdin=GUEST))
    assert all(
        "\\x1b" in each and not any(ord(char) < 32 or char == "\u202e" for char in each) for each in messages
    ), messages


def test_help_names_every_limit_and_the_subcommands(run: Runner) -> None:
    run.mount = None
    words = set(re.split(r"[\s,]+", run("--help").stdout.decode()))
    assert words >= {"compile", "inspect", "--replay", *(name.replace("_", "-") for name in Limits._fields)}


def test_a_folder_with_one_colon_gives_a_hint(run: Runner, tmp_path: Path) -> None:
    guest = tmp_path / "guest.wat"
    guest.write_text('(module (func (export "_start")))')
    assert "HOST::GUEST" in refusal(run, 125, "--dir", f"{tmp_path}:/data", guest)
