"""--invoke and --preload, and the other options of `wasmtime run`: accepted if they are on anyway, else
refused with a reason."""

import subprocess
from pathlib import Path

import pytest

from tests.runner.conftest import Runner, lines

CALLED = """(module
  (import "lib" "twice" (func $twice (param i32) (result i32)))
  (memory (export "memory") 1)
  (global $ready (mut i32) (i32.const 0))
  (func (export "_initialize") (global.set $ready (i32.const 1)))
  (func (export "ready") (result i32) (global.get $ready))
  (func (export "all") (param i32 i64 f32 f64) (result i32 i64 f32 f64)
    (call $twice (local.get 0)) (local.get 1) (local.get 2) (local.get 3))
  (func (export "none"))
  (func (export "trap") unreachable)
  (func (export "spin") (loop (br 0))))"""
LIBRARY = '(module (func (export "twice") (param i32) (result i32) (i32.mul (local.get 0) (i32.const 2))))'
EMPTY = '(module (func (export "_start")))'


@pytest.fixture
def files(tmp_path: Path) -> list[str | Path]:
    """The options and the guest."""
    (tmp_path / "called.wat").write_text(CALLED)
    (tmp_path / "lib.wat").write_text(LIBRARY)
    return ["--preload", f"lib={tmp_path / 'lib.wat'}", tmp_path / "called.wat"]


@pytest.mark.parametrize(
    "call",
    [
        ["all", "16", "-5", "0.1", "1e21"],
        ["all", "-3", "9223372036854775807", "1e-30", "nan"],
        ["all", "1", "1", "16777216.5", "-0"],
        ["all", "1", "1", "-inf", "1.7976931348623157e308"],
        ["ready"],
        ["none"],
    ],
)
def test_results_are_printed_exactly_as_wasmtime_prints_them(
    run: Runner,
    files: list[str | Path],
    wasmtime: Path,
    call: list[str],
) -> None:
    function, *args = call
    command = [*files[:2], "--invoke", function, files[2], *args]
    done = run(*command)
    expected = subprocess.run(
        [wasmtime / "wasmtime", "run", *map(str, command)], capture_output=True, check=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, expected.stdout, b"")


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (["nothing"], 125, "exports no function nothing; its functions: _initialize, all, none"),
        (["memory"], 125, "exports no function memory"),
        (["all", "1"], 125, "all takes 4 arguments, 1 were given"),
        (["all", "x", "1", "1", "1"], 125, "all: x is not a value of the type i32"),
        (["all", "4294967296", "1", "1", "1"], 125, "all: 4294967296 is not a value of the type i32"),
        (["all", "1.5", "1", "1", "1"], 125, "all: 1.5 is not a value of the type i32"),
        (["all", "1", "1", "one", "1"], 125, "all: one is not a value of the type f32"),
        (["trap"], 134, "trapped"),
    ],
)
def test_a_call_that_fails_says_why(
    run: Runner, files: list[str | Path], call: list[str], code: int, message: str
) -> None:
    done = run(*files[:2], "--invoke", call[0], files[2], *call[1:])
    assert (done.returncode, done.stdout) == (code, b"")
    assert message in lines(done.stderr)[0]


def test_a_call_has_the_limits_of_a_run(run: Runner, files: list[str | Path]) -> None:
    assert run(*files[:2], "-W", "timeout=300ms", "--invoke", "spin", files[2]).returncode == 124
    assert run(*files[:2], "-W", "fuel=9999", "--invoke", "spin", files[2]).returncode == 134


def test_a_guest_imports_a_module_that_was_preloaded_from_the_mount(
    run: Runner, tree: Path, tmp_path: Path
) -> None:
    (tree / "root" / "lib.wat").write_text(LIBRARY)
    guest = tmp_path / "guest.wat"
    guest.write_text(
        '(module (import "lib" "twice" (func $t (param i32) (result i32)))'
        ' (func (export "_start") (if (i32.ne (call $t (i32.const 21)) (i32.const 42)) (then unreachable))))'
    )
    assert run("--preload", "lib=/ipfs/root/lib.wat", guest).returncode == 0
    assert run(guest).returncode == 125
    done = run("--preload", "lib=/ipfs/root/none.wat", guest)
    assert (done.returncode, b"/ipfs/root/none.wat" in done.stderr) == (125, True)
    assert b"NAME=MODULE" in run("--preload", "lib", guest).stderr


def test_invoke_refuses_a_component(run: Runner, tmp_path: Path) -> None:
    guest = tmp_path / "guest.wat"
    guest.write_text("(component)")
    done = run("--invoke", "f", guest)
    assert (done.returncode, b"take core modules" in done.stderr) == (125, True)


@pytest.mark.parametrize(
    "options",
    [
        ["run", "-S", "cli,inherit-stdin=y", "-C", "cache=y", "-O", "opt-level=2", "-D", "address-map"],
        ["-S", "cli", "-C", "cache", "-W", "simd,tail-call=y,fuel=1000"],
        *(
            ["-W", each]
            for each in (
                "bulk-memory,multi-memory,multi-value,reference-types,simd,relaxed-simd,tail-call",
                "threads,memory64,component-model,extended-const,exceptions,gc,function-references",
                "wide-arithmetic",
            )
        ),
    ],
)
def test_options_that_are_on_anyway_are_accepted(run: Runner, tmp_path: Path, options: list[str]) -> None:
    guest = tmp_path / "guest.wat"
    guest.write_text(EMPTY)
    if options[0] == "run":
        run.mount, options = None, ["run", "--mount", str(run.mount), *options[1:]]
    done = run(*options, guest)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("-S inherit-network", "a guest gets no network"),
        ("-S http", "a guest gets no network"),
        ("-S cli,tcp=y", "a guest gets no network"),
        ("-S threads", "no threads of its own"),
        ("-S inherit-env", "only the variables of --env"),
        ("-S p3", "preview 3"),
        ("-S unknown", "takes only cli"),
        ("-S cli=n", "takes only cli"),
        ("-C compiler=winch", "Cranelift"),
        ("-O opt-level=0", "takes only opt-level=2"),
        ("-D coredump=/x", "not written to a file"),
        ("-g", "no debugger"),
        ("-g 1234", "no debugger"),
        ("--gdbstub=1234", "no debugger"),
        ("--profile=guest", "profiled"),
        ("--config /x", "settings of wasmtime"),
        ("--target x", "on this machine"),
        ("--allow-precompiled", "precompiled code could do anything"),
        ("-R path=/x", "--record RUN.car"),
        ("-W simd=n", "is not a limit"),
        ("-W stack-switching", "is not a limit"),
    ],
)
def test_other_options_are_refused_with_a_reason(
    run: Runner, tmp_path: Path, options: str, reason: str
) -> None:
    guest = tmp_path / "guest.wat"
    guest.write_text(EMPTY)
    done = run(*options.split(), guest)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert reason in done.stderr.decode()


def test_each_option_has_a_help_text(run: Runner) -> None:
    run.mount = None
    text = run("--help").stdout.decode()
    options = [each for each in text.splitlines() if each.startswith("  -")]
    assert len(options) > 20
    following = dict(zip(text.splitlines(), text.splitlines()[1:], strict=False))
    for each in options:
        described = len(each.strip().split("  ")) > 1 or following[each].startswith(" " * 10)
        assert described, each
