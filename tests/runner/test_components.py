"""Components that real tools made: a Python program by componentize-py, and preview 1 commands by jco's
adapter. They read what is there, change nothing, end as they say, and their runs are repeated from a
record."""

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
    """A mounted folder, and runners: on that mount, for records with a mount of their own, and of someone who
    has no part of it."""

    run: Runner
    recording: Runner
    elsewhere: Runner
    path: str
    """The folder's, as a guest names it."""


@pytest.fixture(scope="module")
def jco(tmp_path_factory: pytest.TempPathFactory) -> Jco:
    return Jco(tmp_path_factory.mktemp("jco") / "tool")


@pytest.fixture(scope="module")
def python(jco: Jco, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guests/component.py, made once: it takes ten seconds."""
    return componentized(GUESTS / "component.py", jco.wit, tmp_path_factory.mktemp("componentize") / "tool")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    (folder / "source" / "dir").mkdir(parents=True)
    for name in ("file", "other"):
        (folder / "source" / name).write_text(f"content of {name}\n")
    home, other = Home(folder / "home"), Home(folder / "elsewhere")
    cid = home.add(folder / "source")
    env, abroad = ({**each.env, "XDG_CACHE_HOME": str(folder / "xdg")} for each in (home, other))
    with home.mounted() as mount:
        yield World(Runner(env, mount.path), Runner(env), Runner(abroad), f"/ipfs/{cid}")
        assert sorted(path.name for path in (mount.path / cid).iterdir()) == ENTRIES
        assert (mount.path / cid / "file").read_text() == "content of file\n"


def told(run: Runner, guest: Path, *args: str) -> list[dict[str, Any]]:
    done = run(guest, *args)
    assert done.returncode == 0, done
    return [json.loads(line) for line in lines(done.stdout)]


def test_a_program_in_python_reads_and_lists(world: World, python: Path) -> None:
    (seen,) = told(world.run, python, "look", world.path, "file")
    assert seen == {"content": "content of file\n", "size": 16, "names": ENTRIES, "root": ["ipfs", "tmp"]}


@pytest.mark.parametrize(
    ("kind", "refusal", "calls"), [("python", PERM, 13), ("descriptors", "NOT_PERMITTED", 15)]
)
def test_a_program_in_python_changes_nothing(
    world: World, python: Path, kind: str, refusal: object, calls: int
) -> None:
    said = {
        each["call"]: each["came"]
        for each in told(world.run, python, "try", world.path, "file")
        if each["kind"] == kind
    }
    assert said == dict.fromkeys(said, refusal)
    assert len(said) == calls


@pytest.mark.parametrize("code", [0, 1, 3, 125, 126, 134, 255])
def test_an_exit_code_of_preview_2_is_the_runs(world: World, python: Path, code: int) -> None:
    done = world.run(python, "exit", str(code))
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


def test_a_program_in_python_that_fails(world: World, python: Path) -> None:
    assert world.run(python, "fail").returncode == 1


def test_a_recorded_run_in_python_is_repeated(world: World, python: Path, tmp_path: Path) -> None:
    target = tmp_path / "run.car"
    done = world.recording("--record", target, python, "look", world.path, "file")
    assert json.loads(done.stdout)["content"] == "content of file\n", done
    same = [f"{what}: the same" for what in ("stdout", "stderr", "exit code", "read", "missing")]
    assert replayed(world, target) == (0, same)
    shown = json.loads(world.elsewhere("inspect", target, "--json").stdout)
    read = {each["path"].removeprefix(world.path): each["read"] for each in shown["paths"]}
    assert read.items() >= {"": 0, "/file": 16}.items()


def replayed(world: World, target: Path) -> tuple[int, Sequence[str]]:
    again = world.elsewhere("--replay", target)
    return again.returncode, lines(again.stdout)


def test_chance_is_fixed_for_the_interfaces_that_the_tool_takes(
    world: World, python: Path, tmp_path: Path
) -> None:
    """They bear another version than wasmtime's own."""
    first, second, free = (tmp_path / f"{name}.car" for name in ("first", "second", "free"))
    said = [
        world.recording("--record", target, "--deterministic", python, "chance").stdout
        for target in (first, second)
    ]
    assert said[0] == said[1]
    assert datetime.fromtimestamp(json.loads(said[0])["wall"] // 10**9, UTC).date() == date(2000, 1, 1)
    assert replayed(world, first)[0] == 0
    assert world.recording("--record", free, python, "chance").stdout != said[0]
    assert replayed(world, free)[0] == 3


def test_an_adapted_command_changes_nothing(
    world: World, jco: Jco, build_guest: Callable[[str], Path]
) -> None:
    below = world.path.removeprefix("/ipfs/")
    done = world.run(jco.component(build_guest("writes")), f"{below}/file", f"{below}/dir")
    said = {name: int(errno) for name, errno in map(str.split, lines(done.stdout))}
    assert said.pop("fd_allocate") == NOTSUP
    assert said == dict.fromkeys(said, PERM)
    assert len(said) == 18


@pytest.mark.parametrize(("given", "code"), [("0", 0), ("3", 1)])
def test_an_adapted_command_ends_as_it_says(
    world: World, jco: Jco, habits: Path, given: str, code: int
) -> None:
    """The adapter calls wasi:cli/exit, which tells success from failure alone."""
    assert world.run(jco.component(habits), "exit", given).returncode == code


@pytest.mark.parametrize("engine", ["library", "command"])
def test_an_adapted_command_writes_where_it_may(
    world: World, jco: Jco, habits: Path, wasmtime: Path, tmp_path: Path, engine: str
) -> None:
    """The lock around its process lets /tmp and /out through."""
    run = Runner({**world.run.env, "PATH": f"{wasmtime}{os.pathsep}{os.environ['PATH']}"}, world.run.mount)
    component, out = jco.component(habits), tmp_path / "out"
    given = ["--require-sandbox", "--engine", engine, "--out", out, component, "write"]
    for path, names in (("/out/result", ["result"]), ("/tmp/file", [])):
        done = run(*given, path)
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
    said, count = done.stdout.split()
    assert (said.decode(), int(count)) == digest(tree)
    assert world.elsewhere("--replay", target).returncode == 0
