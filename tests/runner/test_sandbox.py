"""A guest can't change anything below /ipfs, or leave it. There is one test for each call of preview 1 and of
preview 2."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipfsfuse_run.errors import GuestRefused
from ipfsfuse_run.sandbox import open_beneath
from tests.mounting import Home
from tests.runner.conftest import DEMO, Runner, lines
from tests.runner.writesp2 import CALLS, NOT_PERMITTED, OPENED_TO_CHANGE, SUCCESS, TRIES, component

NOTSUP, BADF, PERM = 58, 8, 63
P1_EXCEPTIONS = {"fd_write": BADF, "fd_pwrite": BADF, "fd_allocate": NOTSUP}
"""Calls that wasmtime answers before it looks at the folder's permissions."""
P1_CALLS = [
    *(
        "open-write",
        "open-read-write",
        "open-append",
        "open-create",
        "open-create-write",
        "open-exclusive",
        "open-truncate",
    ),
    *(
        "path_create_directory",
        "path_remove_directory",
        "path_unlink_file",
        "path_rename",
        "path_link",
        "path_symlink",
    ),
    *(
        "path_filestat_set_times",
        "fd_filestat_set_size",
        "fd_filestat_set_times",
        "fd_write",
        "fd_pwrite",
        "fd_allocate",
    ),
]


class World:
    """A mounted tree, and the error number of each call by which the guests tried to change it."""

    def __init__(self, run: Runner, cid: str, top: Path, p1: dict[str, int], p2: dict[str, int]) -> None:
        self.run, self.cid, self.top, self.p1, self.p2 = run, cid, top, p1, p2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, build_guest: Callable[[str], Path]) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    source = folder / "source"
    (source / "dir").mkdir(parents=True)
    (source / "file").write_text("content\n")
    (source / "absolute").symlink_to("/etc/hostname")
    (source / "inside").symlink_to("/ipfs")
    (source / "upward").symlink_to("../../../etc/hostname")
    (source / "right").symlink_to("dir/../file")
    home = Home(folder / "home")
    cid = home.add(source)
    with home.mounted() as mount:
        run = Runner({**home.env, "XDG_CACHE_HOME": str(folder / "xdg")}, mount.path)
        p1 = run(build_guest("writes"), f"{cid}/file", f"{cid}/dir")
        guest = folder / "writes.wat"
        guest.write_text(component(f"{cid}/file", f"{cid}/dir"))
        p2 = run(guest)
        assert (p1.returncode, p2.returncode) == (0, 0), (p1, p2)
        p1_errors = {name: int(errno) for name, errno in map(str.split, lines(p1.stdout))}
        yield World(run, cid, mount.path, p1_errors, dict(zip(TRIES, p2.stdout, strict=True)))
        assert sorted(os.listdir(mount.path / cid)) == sorted(os.listdir(source))
        assert (mount.path / cid / "file").read_text() == "content\n"


@pytest.mark.fuse
@pytest.mark.parametrize("call", P1_CALLS)
def test_preview_1_can_not_change_anything(world: World, call: str) -> None:
    assert world.p1[call] == P1_EXCEPTIONS.get(call, PERM)


@pytest.mark.fuse
@pytest.mark.parametrize("call", CALLS)
def test_preview_2_can_not_change_anything(world: World, call: str) -> None:
    assert world.p2[call] == NOT_PERMITTED


@pytest.mark.fuse
def test_a_directory_that_is_opened_for_changes_can_not_be_changed(world: World) -> None:
    assert world.p2[OPENED_TO_CHANGE] == SUCCESS
    assert world.p2["create in that directory"] == NOT_PERMITTED


@pytest.mark.fuse
@pytest.mark.parametrize("guest", ["reader-p1.wat", "reader-p2.wat"])
def test_the_demo_guests_can_read_and_can_not_write(world: World, guest: str) -> None:
    done = world.run(DEMO / guest, f"/ipfs/{world.cid}/file")
    first, *tries = lines(done.stdout)
    assert (done.returncode, first, len(tries)) == (0, "content", 3)
    assert all(each.endswith(": Operation not permitted") for each in tries)


@pytest.mark.fuse
def test_a_guest_can_not_leave(world: World, build_guest: Callable[[str], Path]) -> None:
    base = f"/ipfs/{world.cid}"
    inside = [f"{base}/file", f"{base}/right", f"{base}/dir/../file"]
    ways_out = [
        f"{base}/absolute",
        f"{base}/inside/{world.cid}/file",
        f"{base}/upward",
        "/ipfs/../etc/hostname",
        f"{base}/../../../../etc/hostname",
    ]
    output = lines(
        world.run(build_guest("reach"), *inside, *ways_out, "/etc/hostname", "../etc/hostname").stdout
    )
    output = [line for line in output if line]
    assert output[:3] == [f"{each}: content" for each in inside]
    assert len(output) == 3 + len(ways_out) + 2
    assert all(": errno " in line for line in output[3:])


def test_the_folder_that_was_checked_is_the_one_that_is_given(tmp_path: Path) -> None:
    """A guest that may write to the folder above could replace the working directory after the check."""
    work = tmp_path / "given" / "work"
    (work / "right").mkdir(parents=True)
    (tmp_path / "elsewhere" / "wrong").mkdir(parents=True)
    with open_beneath(str(tmp_path / "given"), "work", "--cwd /given/work") as folder:
        work.rename(tmp_path / "given" / "moved")
        work.symlink_to(tmp_path / "elsewhere")
        assert os.listdir(f"/proc/self/fd/{folder}") == ["right"]
    with (
        pytest.raises(GuestRefused, match="leads out"),
        open_beneath(str(tmp_path / "given"), "work", "--cwd /given/work"),
    ):
        pass


@pytest.mark.fuse
def test_an_encoded_slash_and_a_backslash_do_not_separate_names(
    world: World, build_guest: Callable[[str], Path]
) -> None:
    output = world.run(
        build_guest("reach"), f"/ipfs/{world.cid}%2Ffile", f"/ipfs/{world.cid}\\file"
    ).stdout.decode()
    assert output.count("errno 44") == 2
