"""The cases of preview 1's test suite that a read-only folder allows, in the mount and in a folder of the
host. The guest makes the calls directly."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounting import Home
from tests.runner.conftest import Runner, lines

pytestmark = pytest.mark.fuse

BADF, INVAL, LOOP, NAMETOOLONG, NOENT, NOTDIR, PERM = 8, 28, 32, 37, 44, 54, 63
DIRECTORY, REGULAR, SYMLINK = 3, 4, 7
GROUPS: dict[str, dict[int, str]] = {
    "prestat": {1: "found", NAMETOOLONG: "name-too-short", BADF: "of-a-stream of-nothing"},
    "open": {
        0: "file folder folder-with-slash dot there-and-back link link-to-folder "
        "folder-link-itself-on-the-way",
        NOTDIR: "file-as-folder below-a-file file-with-slash at-a-file",
        NOENT: "missing empty-name dangling",
        LOOP: "link-itself dangling-itself loop loop-of-two loop-on-the-way",
        PERM: "parent parent-of-parent absolute link-outside absolute-link",
        NAMETOOLONG: "long-name",
        BADF: "at-nothing",
    },
    "readdir": {
        52: "large again small one-entry",
        0: "less-than-a-head no-room past-the-end past-the-end-used",
        10: "less-than-a-head-used",
        BADF: "of-a-file of-nothing",
    },
    "read": {
        0: "into-two past-the-end past-the-end-count nothing nothing-count",
        1: "into-two-right",
        BADF: "of-a-folder of-nothing closed",
    },
    "pread": {0: "moves-nothing past-the-end past-the-end-count", 4: "count", 1: "right"},
    "seek": {
        0: "back from-the-end past-the-end",
        5: "back-at",
        6: "from-the-end-at",
        1000: "past-the-end-at",
        INVAL: "before-the-start",
        BADF: "in-a-folder",
    },
    "tell": {8: "at"},
    "close": {BADF: "again"},
    "stat": {
        0: "file folder link link-itself dangling-itself loop-itself",
        REGULAR: "file-type link-type",
        DIRECTORY: "folder-type",
        SYMLINK: "link-itself-type dangling-itself-type loop-itself-type",
        NOENT: "dangling missing",
        LOOP: "loop",
        PERM: "parent outside",
    },
    "filestat": {8: "size of-nothing", 1: "links same-inode other-inode", 0: "empty-size"},
    "fdstat": {REGULAR: "type", DIRECTORY: "folder-type", 0: "may-write folder", BADF: "of-nothing"},
    "readlink": {
        4: "used",
        1: "right",
        0: "cut dangling loop",
        2: "cut-used",
        INVAL: "of-a-file",
        NOENT: "of-a-missing",
        PERM: "outside absolute",
    },
    "args": {0: "sizes", 2: "count", 9: "size", 1: "first"},
    "environ": {0: "sizes", 1: "count right", 4: "size"},
    "clock": {0: "res wall", 1: "res-set goes-on"},
    "random": {1: "differs", 0: "nothing"},
    "poll": {1: "count", 7: "userdata", 0: "error type", INVAL: "nothing"},
    "renumber": {BADF: "gone nothing", 0: "there"},
}
SUCCEEDING = (
    "advise args clock close datasync environ fdstat filestat poll pread random readlink renumber sync "
    "tell yield"
)
"""Calls that succeed. The name of the case is the name of the call."""


def expected(group: str) -> dict[str, int]:
    return {f"{group}-{case}": value for value, cases in GROUPS[group].items() for case in cases.split()}


def tree(folder: Path) -> Path:
    (folder / "dir").mkdir(parents=True)
    (folder / "file").write_text("content\n")
    (folder / "empty").touch()
    for number in range(50):
        (folder / "dir" / f"e{number:02}").touch()
    links = {
        "link": "file",
        "dirlink": "dir",
        "dangling": "nowhere",
        "loop": "loop",
        "one": "two",
        "two": "one",
    }
    for name, target in (links | {"outside": "../etc", "absolute": "/etc/hostname"}).items():
        (folder / name).symlink_to(target)
    return folder


@pytest.fixture(scope="module", params=["mount", "folder"])
def results(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    build_guest: Callable[[str], Path],
) -> dict[str, int]:
    """The result of each case, as the guest printed it."""
    folder = tmp_path_factory.mktemp("preview1")
    source = tree(folder / "source")
    home = Home(folder / "home")
    cid = home.add(source)
    with home.mounted() as mount:
        run = Runner({**home.env, "XDG_CACHE_HOME": str(folder / "xdg")}, mount.path)
        preopen = mount.path / cid if request.param == "mount" else source
        done = run(
            "--argv0", "guest", "--env", "A=1", "--dir", f"{preopen}::/w::ro", build_guest("preview1"), "/w"
        )
    assert done.returncode == 0, done
    return {name: int(value) for name, value in map(str.split, lines(done.stdout))}


@pytest.mark.parametrize("group", GROUPS)
def test_calls_end_as_preview_1_says(results: dict[str, int], group: str) -> None:
    wanted = expected(group)
    assert {name: results.get(name) for name in wanted} == wanted


def test_the_other_calls_succeed_and_there_are_no_more_cases(results: dict[str, int]) -> None:
    succeeding = set(SUCCEEDING.split())
    assert {name: results[name] for name in succeeding} == dict.fromkeys(succeeding, 0)
    assert set(results) - succeeding == {name for group in GROUPS for name in expected(group)}
