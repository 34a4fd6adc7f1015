"""Shared by these tests: mounts that ask a real node, trees for the node, and Kubo's own mount."""

import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.kubo.node import Node
from tests.mounting import Home, Mounted

SEED = 11


def source(node: Node) -> str:
    """A node as an argument of `--from`."""
    return "kubo+" + node.api_url


@contextmanager
def mounted(
    home: Home, *nodes: Node, options: Sequence[str | Path] = (), at: Path | None = None
) -> Iterator[Mounted]:
    """A mount that asks `nodes`."""
    with home.mounted(
        *(word for node in nodes for word in ("--from", source(node))), *options, at=at
    ) as mount:
        yield mount


def write_tree(folder: Path, *, many: int = 250) -> Path:
    """Files of about the chunk sizes, nested folders, symlinks, odd names, and a folder of `many`
    entries, for a HAMT."""
    dice = random.Random(SEED)
    tree = folder / "tree"
    (tree / "deep" / "deeper").mkdir(parents=True)
    (tree / "empty folder").mkdir()
    for size in (0, 1, 2_000, 262_143, 262_144, 262_145, 1 << 20, (1 << 20) + 1, 5_000_001):
        (tree / "deep" / f"{size}.bin").write_bytes(dice.randbytes(size))
    (tree / "deep" / "deeper" / "ünïcode ☃").write_text("snow\n")
    (tree / "deep" / "same").write_text("snow\n")
    (tree / "link").symlink_to("deep/same")
    (tree / "dangling").symlink_to("nowhere/at all")
    crowd = tree / "many"
    crowd.mkdir()
    for number in range(many):
        (crowd / f"{number:04} of many, whose names are long enough to make the folder a HAMT").write_bytes(
            dice.randbytes(dice.randrange(100))
        )
    return tree


def dated(tree: Path) -> Path:
    """Gives all files and folders unusual modes and times."""
    dice = random.Random(SEED)
    for path in sorted(tree.rglob("*"), reverse=True):
        if not path.is_symlink():
            path.chmod(
                dice.choice((0o755, 0o700, 0o511))
                if path.is_dir()
                else dice.choice((0o644, 0o600, 0o755, 0o444, 0o421))
            )
        os.utime(path, ns=(0, dice.randrange(1, 2_000_000_000 * 10**9)), follow_symlinks=False)
    return tree


def same(one: Path, other: Path) -> None:
    """Asserts that `diff -r` finds nothing."""
    done = subprocess.run(["diff", "-r", "--no-dereference", one, other], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def drop_pages(path: Path) -> None:
    """Makes the kernel drop the pages of a file, so that the next read asks the mount."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def again_and_again(do: Callable[[], Any]) -> Iterator[threading.Event]:
    """Calls `do` in a loop in a thread until the block ends. The event is set after each call."""
    done, end = threading.Event(), threading.Event()
    failure: list[BaseException] = []

    def loop() -> None:
        try:
            while not end.is_set():
                do()
                done.set()
        except BaseException as exc:
            failure.append(exc)
            done.set()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield done
    finally:
        end.set()
        thread.join()
    if failure:
        raise failure[0]


@contextmanager
def kubos_own_mount(node: Node) -> Iterator[Path]:
    """Kubo's own mount of the node. Skips the test if Kubo can't mount."""
    folders = [node.folder / name for name in ("kubo-ipfs", "kubo-ipns", "kubo-mfs")]
    for folder in folders:
        folder.mkdir()
    try:
        try:
            node.cmd("mount", "-f", folders[0], "-n", folders[1], "-m", folders[2])
        except RuntimeError as exc:
            pytest.skip(f"Kubo can't mount here: {exc}")
        yield folders[0]
    finally:
        for folder in folders:
            subprocess.run(["fusermount3", "-u", "-q", folder], check=False)
            with suppress(OSError):
                folder.rmdir()
