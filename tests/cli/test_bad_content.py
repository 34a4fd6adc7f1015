"""Sources and files that can't be used, and commands with nothing to work on: they fail with one line that
names the cause, and leave nothing behind."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounting import Home

pytestmark = pytest.mark.fuse


# -- sources -------------------------------------------------------------------------------------------------


CARS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _car: b"", "the file is empty"),
    "not a CAR": (lambda _car: b"<html>this is not the file you want</html>" * 9, "x.car"),
    "header cut": (lambda car: car[:20], "x.car"),
    "wrong header length": (lambda car: b"\xff\xff\xff\xff\x0f" + car[1:], "x.car"),
}


@pytest.fixture
def car(user: Home) -> bytes:
    source = user.folder / "source"
    source.mkdir()
    (source / "a").write_text("hello\n")
    user.run("export", user.add(source), user.folder / "good.car")
    return (user.folder / "good.car").read_bytes()


@pytest.mark.parametrize("kind", CARS)
def test_a_source_that_is_not_a_car(user: Home, car: bytes, kind: str) -> None:
    spoil, names = CARS[kind]
    (user.folder / "x.car").write_bytes(spoil(car))
    user.refused("mount", "--from", user.folder / "x.car", user.mountpoint, names=names)


def test_a_source_that_is_missing(user: Home) -> None:
    user.refused(
        "mount",
        "--from",
        user.folder / "none.car",
        user.mountpoint,
        names=f"{user.folder / 'none.car'}: no such file",
        code=2,
    )


@pytest.mark.parametrize("text", ["htps://gateway.example", "kubo+ftp://127.0.0.1", "http://"])
def test_a_source_with_a_typing_error(user: Home, text: str) -> None:
    user.refused("mount", "--from", text, user.mountpoint, names=text.partition("//")[0], code=2)


def test_a_source_given_twice(user: Home, car: bytes) -> None:
    file = user.folder / "good.car"
    user.refused("mount", "--from", file, "--from", file, user.mountpoint, names="given twice", code=2)


# -- add -----------------------------------------------------------------------------------------------------


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_not_utf8(path: Path) -> None:
    Path(os.fsdecode(os.fsencode(path) + b"\xff")).touch()


@pytest.mark.parametrize("make", [make_fifo, make_socket, make_not_utf8])
def test_add_of_a_folder_with_an_entry_that_can_not_be_added(
    user: Home, make: Callable[[Path], None]
) -> None:
    folder = user.folder / "folder"
    folder.mkdir()
    (folder / "a-good-one").write_text("x")
    make(folder / "thing")
    user.refused("add", folder, names="thing")
    assert user.json("library", "--json") == []


@pytest.mark.parametrize("path", ["none", "/dev/null"])
def test_add_of_a_single_path_that_can_not_be_added(user: Home, path: str) -> None:
    user.refused("add", path, names=path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_add_of_a_file_that_this_user_may_not_read() -> None:
    with tempfile.TemporaryDirectory() as folder:  # only this user may enter the folders above tmp_path
        user = Home(Path(folder))
        file = user.folder / "file"
        file.write_text("x")
        file.chmod(0o600)
        for path in (user.folder, user.mountpoint):
            os.chown(path, 65534, 65534)
        ran = subprocess.run(
            [sys.executable, "-c", AS_OTHER, file], env=user.env, capture_output=True, text=True
        )
        assert (ran.returncode, ran.stderr) == (1, f"ipfsfuse: {file}: Permission denied\n")
        assert not list(user.library.glob("roots/*"))


AS_OTHER = """
import os, sys
from ipfsfuse.cli.main import main
main(["add", "--only-hash", sys.argv[1]])  # imports all modules: the other user may not read them
os.setresuid(65534, 65534, 65534)
sys.exit(main(["add", sys.argv[1]]))
"""


def test_add_keeps_a_symlink_loop_as_it_is(user: Home) -> None:
    (user.folder / "loop").symlink_to("loop")
    assert user.run("add", user.folder / "loop").stdout.startswith("added bafy")


def test_add_of_a_tree_1000_deep(user: Home) -> None:
    top = user.folder / "deep"
    top.mkdir()
    at = os.open(top, os.O_RDONLY)
    for _ in range(1000):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    assert user.run("add", "-Q", top).stdout.startswith("bafy")
    shutil.rmtree(top) if sys.version_info >= (3, 13) else subprocess.run(["rm", "-rf", top], check=True)


# -- commands without a mount --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [("status",), ("ls",), ("fsck",), ("evict", "--all"), ("pin", "bafkqaaa"), ("status", "--json")],
)
def test_commands_where_nothing_is_mounted(user: Home, command: tuple[str, ...]) -> None:
    user.refused(*command, names=f"no mount uses {user.cache}")


def test_export_of_content_that_no_source_has(user: Home) -> None:
    cid = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
    user.refused("export", cid, user.folder / "x.car", names=cid)
    assert not list(user.folder.glob("*x.car*"))


def test_rm_of_a_cid_that_is_not_in_the_library(user: Home) -> None:
    user.refused("rm", "bafkqaaa", names="bafkqaaa is not a root of the library")
