"""Components that real tools make: a Python program by componentize-py, and preview 1 commands by jco's
adapter. They can read and can't change anything, their exit codes are right, and their recorded runs can be
repeated."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.mounting import Home
from tests.realtree import copy_of_the_standard_library
from tests.runner.components import Jco, componentized
from tests.runner.conftest import GUESTS, Runner, lines
from tests.runner.test_real_tree import digest

pytestmark = [pytest.mark.fuse, pytest.mark.slow]

PERM, NOTSUP = 63, 58
ENTRIES = ["dir", "file", "other"]


class World(NamedTuple):
    """A mounted folder, and three runners: one on that mount; one that makes its own mounts, to record runs;
    and one of a user who has no part of the content."""

    run: Runner
    recording: Runner
    elsewhere: Runner
    path: str
    """The path of the folder, for a guest."""


@pytest.fixture(scope="module")
def jco(tmp_path_factory: pytest.TempPathFactory) -> Jco:
    return Jco(tmp_path_factory.mktemp("jco") / "tool")


@pytest.fixture(scope="module")
def python(jco: Jco, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guests/component.py as a component. It is made once, because that takes ten seconds."""
    return componentized(GUESTS / "component.py", jco.wit, tmp_path_factory.mktemp("componentize") / "tool")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    (folder / "source" / "dir").mkdir(parents=True)
    for name in ("file", "other"):
        (folder / "source" / name).write_text(f"content of {name}\n")
    home, other = Home(folder / "home"), Home(folder / "elsewhere")
    cid = home.add(folder / "source")
    env, other_env = ({**each.env, "XDG_CACHE_HOME": str(folder / "xdg")} for each in (home, other))
    with home.mounted() as mount:
        yield World(Runner(env, mount.path), Runner(env), Runner(other_env), f"/ipfs/{cid}")
        assert sorted(path.name for path in (mount.path / cid).iterdir()) == ENTRIES
        assert (mount.path / cid / "file").read_text() == "content of file\n"


def printed(run: Runner, guest: Path, *args: str) -> list[dict[str, Any]]:
    done = run(guest, *args)
    assert done.returncode == 0, done
    return [json.loads(line) for line in lines(done.stdout)]


def test_a_program_in_python_reads_and_lists(world: World, python: Path) -> None:
    (seen,) = printed(world.run, python, "look", world.path, "file")
    assert seen == {"content": "content of file\n", "size": 16, "names": ENTRIES, "root": ["ipfs", "tmp"]}


@pytest.mark.parametrize(
    ("kind", "refusal", "calls"), [("python", PERM, 13), ("descriptors", "NOT_PERMITTED", 15)]
)
def test_a_program_in_python_changes_nothing(
    world: World, python: Path, kind: str, refusal: object, calls: int
) -> None:
    refusals = {
        each["call"]: each["came"]
        for each in printed(world.run, python, "try", world.path, "file")
        if each["kind"] == kind
    }
    assert refusals == dict.fromkeys(refusals, refusal)
    assert len(refusals) == calls


@pytest.mark.parametrize("code", [0, 1, 3, 125, 126, 134, 255])
def test_the_exit_code_of_a_component_is_the_exit_code_of_the_run(
    world: World, python: Path, code: int
) -> None:
    done = world.run(python, "exit", str(code))
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


def test_a_program_in_python_that_fails_gives_exit_code_1(world: World, python: Path) -> None:
    assert world.run(python, "fail").returncode == 1


def test_a_recorded_run_in_python_is_repeated(world: World, python: Path, tmp_path: Path) -> None:
    target = tmp_path / "run.car"
    done = world.recording("--record", target, python, "look", world.path, "file")
    assert json.loads(done.stdout)["content"] == "content of file\n", done
    same = [f"{part}: the same" for part in ("stdout", "stderr", "exit code", "read", "missing")]
    assert replayed(world, target) == (0, same)
    shown = json.loads(world.elsewhere("inspect", target, "--json").stdout)
    read = {each["path"].removeprefix(world.path): each["read"] for each in shown["paths"]}
    assert read.items() >= {"": 0, "/file": 16}.items()


def replayed(world: World, target: Path) -> tuple[int, Sequence[str]]:
    again = world.elsewhere("--replay", target)
    return again.returncode, lines(again.stdout)


def test_clocks_and_random_numbers_are_fixed_for_the_interfaces_of_the_tool(
    world: World, python: Path, tmp_path: Path
) -> None:
    """Their version is not that of wasmtime's own interfaces."""
    first, second, free = (tmp_path / f"{name}.car" for name in ("first", "second", "free"))
    output = [
        world.recording("--record", target, "--deterministic", python, "chance").stdout
        for target in (first, second)
    ]
    assert output[0] == output[1]
    assert datetime.fromtimestamp(json.loads(output[0])["wall"] // 10**9, UTC).date() == date(2000, 1, 1)
    assert replayed(world, first)[0] == 0
    assert world.recording("--record", free, python, "chance").stdout != output[0]
    assert replayed(world, free)[0] == 3


def test_an_adapted_command_changes_nothing(
    world: World, jco: Jco, build_guest: Callable[[str], Path]
) -> None:
    path = world.path.removeprefix("/ipfs/")
    done = world.run(jco.component(build_guest("writes")), f"{path}/file", f"{path}/dir")
    errors = {name: int(errno) for name, errno in map(str.split, lines(done.stdout))}
    assert errors.pop("fd_allocate") == NOTSUP
    assert errors == dict.fromkeys(errors, PERM)
    assert len(errors) == 18


@pytest.mark.parametrize(("argument", "code"), [("0", 0), ("3", 1)])
def test_an_adapted_command_gives_exit_code_1_for_every_failure(
    world: World, jco: Jco, habits: Path, argument: str, code: int
) -> None:
    """The adapter calls wasi:cli/exit, which distinguishes only success and failure."""
    assert world.run(jco.component(habits), "exit", argument).returncode == code


@pytest.mark.parametrize("engine", ["library", "command"])
def test_an_adapted_command_writes_where_it_may(
    world: World, jco: Jco, habits: Path, wasmtime: Path, tmp_path: Path, engine: str
) -> None:
    """The sandbox of its process allows /tmp and /out."""
    run = Runner({**world.run.env, "PATH": f"{wasmtime}{os.pathsep}{os.environ['PATH']}"}, world.run.mount)
    component, out = jco.component(habits), tmp_path / "out"
    command = ["--require-sandbox", "--engine", engine, "--out", out, component, "write"]
    for path, names in (("/out/result", ["result"]), ("/tmp/file", [])):
        done = run(*command, path)
        assert (done.returncode, [each.name for each in out.iterdir()]) == (0, names), done
        shutil.rmtree(out)


def test_an_adapted_command_walks_a_real_tree_and_its_run_is_repeated(
    tmp_path: Path, jco: Jco, world: World, build_guest: Callable[[str], Path]
) -> None:
    tree = copy_of_the_standard_library(tmp_path / "python") / "json"
    home = Home(tmp_path / "home")
    cid, target = home.add(tree), tmp_path / "run.car"
    run = Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg")})
    done = run("--record", target, jco.component(build_guest("digest")), f"/ipfs/{cid}")
    sha256, count = done.stdout.split()
    assert (sha256.decode(), int(count)) == digest(tree)
    assert world.elsewhere("--replay", target).returncode == 0
