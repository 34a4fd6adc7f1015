"""Whole directories from a real node: how many requests a reader causes that reads all their files, and what
the kernel gets before it asks."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.counting import counted
from tests.kubo.node import Node
from tests.mounting import Home, wait_until


def folders(folder: Path, count: int, files: int) -> dict[str, bytes]:
    """`count` folders of `files` small files each; contents by path."""
    dice, made = random.Random(count), dict[str, bytes]()
    for number in range(count):
        (folder / f"{number:02}").mkdir(parents=True)
        for file in range(files):
            name = f"{number:02}/{file:02}"
            made[name] = dice.randbytes(dice.randrange(1, 20_000))
            (folder / name).write_bytes(made[name])
    return made


def read_in_order(root: Path, names: list[str]) -> dict[str, bytes]:
    script = (
        "import sys, json; [sys.stdout.write(json.dumps(open(name, 'rb').read().hex()) + '\\n') for "
        "name in sys.argv[1:]]"
    )
    read = subprocess.run(
        [sys.executable, "-c", script, *names], cwd=root, stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(
        zip(names, (bytes.fromhex(json.loads(line)) for line in read.stdout.splitlines()), strict=True)
    )


def requests(home: Home) -> int:
    return int(home.json("status", "--json")["sources"][0]["requests"])


@pytest.mark.parametrize("crowd", [1, 4])
def test_the_files_of_directories_that_are_read_in_order_are_fetched_ahead(
    kubo_node: Node, home: Home, crowd: int
) -> None:
    contents = folders(home.folder / "tree", 8, 30)
    root = home.mountpoint / kubo_node.cmd(
        "add", "-Q", "-r", "--cid-version=1", "--raw-leaves", home.folder / "tree"
    )
    with counted(home, f"kubo+{kubo_node.api_url}") as kernel:
        for number in range(8):
            names = [name for name in contents if name.startswith(f"{number:02}/")]
            subprocess.run(["ls", root / f"{number:02}"], check=True, stdout=subprocess.DEVNULL)
            readers = [
                subprocess.Popen(["cat", *names], cwd=root, stdout=subprocess.PIPE) for _ in range(crowd - 1)
            ]
            assert read_in_order(root, names) == {name: contents[name] for name in names}
            for reader in readers:
                assert reader.communicate()[0] == b"".join(contents[name] for name in names)
        assert requests(home) < len(contents) // 4, "one answer brings many files"
        if crowd == 1:
            assert kernel.now()["read"] < len(contents) // 2, (
                "most files were in the page cache when they were opened"
            )


def test_the_kernel_asks_for_a_listing_once_and_for_that_of_the_root_each_time(
    kubo_node: Node, home: Home
) -> None:
    folders(home.folder / "tree", 1, 30)
    root = home.mountpoint / kubo_node.cmd(
        "add", "-Q", "-r", "--cid-version=1", "--raw-leaves", home.folder / "tree"
    )
    with counted(home, f"kubo+{kubo_node.api_url}") as kernel:
        listed = [
            subprocess.run(["ls", "-a", root / "00"], check=True, capture_output=True, text=True).stdout
            for _ in range(2)
        ]
        before = kernel.now()
        listed += [
            subprocess.run(["ls", "-a", root / "00"], check=True, capture_output=True, text=True).stdout
        ]
        assert listed[0].split() == [".", "..", *(f"{number:02}" for number in range(30))]
        assert listed[0] == listed[1] == listed[2]
        assert kernel.since(before)["opendir"] == 0
        assert kernel.since(before)["readdir"] == 0
        assert subprocess.run(
            ["ls", home.mountpoint], check=True, capture_output=True, text=True
        ).stdout.split() == [root.name]
        other = kubo_node.cmd(
            "add", "-Q", "-r", "--cid-version=1", "--raw-leaves", home.folder / "tree" / "00"
        )
        subprocess.run(["ls", home.mountpoint / other], check=True, stdout=subprocess.DEVNULL)
        named = subprocess.run(
            ["ls", home.mountpoint], check=True, capture_output=True, text=True
        ).stdout.split()
        assert sorted(named) == sorted([root.name, other]), (
            "the root is listed anew each time, because names may appear in it"
        )


def test_a_large_listing_needs_few_requests_and_fetches_no_child(kubo_node: Node, home: Home) -> None:
    tree = home.folder / "tree"
    tree.mkdir()
    for number in range(3000):
        (tree / f"entry-{number:04}-{'x' * 60}").write_text(str(number))
    cid = kubo_node.cmd("add", "-Q", "-r", "--cid-version=1", "--raw-leaves", tree)
    with counted(home, f"kubo+{kubo_node.api_url}") as kernel:
        before = requests(home)
        listed = subprocess.run(
            ["ls", "-l", home.mountpoint / cid], check=True, capture_output=True, text=True
        ).stdout
        assert len(listed.splitlines()) == 3001
        assert requests(home) - before < 20, "one answer brings hundreds of HAMT nodes"
        assert kernel.now()["getattr"] < 100, "sizes come with the names"


def test_files_that_were_opened_without_python_are_pinned_and_staged_again_after_an_eviction(
    kubo_node: Node, home: Home
) -> None:
    contents = folders(home.folder / "tree", 3, 30)
    root = home.mountpoint / kubo_node.cmd(
        "add", "-Q", "-r", "--cid-version=1", "--raw-leaves", home.folder / "tree"
    )
    with counted(home, f"kubo+{kubo_node.api_url}", pins="kubo") as kernel:
        for _ in range(2):
            for number in range(3):
                subprocess.run(["ls", root / f"{number:02}"], check=True, stdout=subprocess.DEVNULL)
            assert read_in_order(root, list(contents)) == contents
        asked = kernel.now()
        assert asked["open"] < len(contents) + asked["lookup"], "some files were opened without Python"
        wait_until(
            lambda: all(os.getxattr(root / name, "ipfsfuse.pinned") == b"cache" for name in contents),
            "all files are pinned",
        )

        def nothing_is_staged() -> bool:
            home.run("evict", "--all")  # repeated, because something may have been staged meanwhile
            return home.json("ls", "--json")["small"]["blocks"] == 0  # the count is up to a second old

        wait_until(nothing_is_staged, "nothing is staged")
        assert read_in_order(root, list(contents)) == contents
        wait_until(
            lambda: all(os.getxattr(root / name, "ipfsfuse.staged") != b"0" for name in contents),
            "all files are staged again",
        )
