"""What users see of a mount and its node, and what a mount still exports when its node is gone."""

import os
import re
from pathlib import Path

import pytest

from ipfsfuse.cli import console
from tests.cli.conftest import on_terminal
from tests.kubo.node import Node
from tests.mounting import Home

pytestmark = pytest.mark.fuse


def add_tree(node: Node, folder: Path) -> str:
    (folder / "dir").mkdir(parents=True)
    (folder / "large").write_bytes(os.urandom(3_000_000))
    (folder / "dir" / "small").write_text("small\n")
    return node.cmd("add", "-Q", "-r", "--cid-version=1", folder).strip()


def test_a_node_and_its_pins_in_a_table(user: Home, kubo_node: Node) -> None:
    cid = add_tree(kubo_node, user.folder / "tree")
    name = f"kubo+{kubo_node.api_url}"
    with user.mounted("--from", name, "--from", "library") as mount:
        assert (mount.path / cid / "dir" / "small").read_text() == "small\n"
        assert len((mount.path / cid / "large").read_bytes()) == 3_000_000
        shown = user.run("status").stdout
        listed = user.run("ls").stdout.splitlines()
        as_json = user.json("ls", "--json")
    heads, values = r"held  queued  batches  requests  folder +failing", r"\d+ .* /ipfsfuse/\S+ +-"
    assert re.search(rf"(?m)^pins:\n  node +{heads}\n  {re.escape(name)} +{values}$", shown)
    assert re.search(
        rf"(?m)^sources:\n  name +state  requests  blocks .* why\n  {re.escape(name)} +good +\d+ .* "
        r"-\n  library +good .* -$",
        shown,
    )
    (large,) = as_json["entries"]
    assert listed[0].startswith(f"{large['cid']}         whole    2.9 MiB")
    assert re.fullmatch(r"and \d+ small blocks \(files up to 64 KiB, directories, links\): \d+ B", listed[1])
    assert as_json["small"]["bytes"] > len("small\n")


def test_small_blocks_are_counted(user: Home, kubo_node: Node) -> None:
    cid = add_tree(kubo_node, user.folder / "tree")
    with user.mounted("--from", f"kubo+{kubo_node.api_url}") as mount:
        assert len((mount.path / cid / "dir" / "small").read_text()) == 6
    with user.mounted("--from", f"kubo+{kubo_node.api_url}"):  # all that was staged is in the index by now
        assert user.json("ls", "--json")["small"]["blocks"] == 3  # the root, dir, small


@pytest.mark.parametrize("options", [("--cid-version=1", "--chunker=size-1048576"), ("--cid-version=0",)])
def test_a_mount_exports_what_it_has_when_its_node_is_gone(
    user: Home, own_node: Node, options: tuple[str, ...]
) -> None:
    add_tree(own_node, user.folder / "tree")
    cid = own_node.cmd("add", "-Q", "-r", *options, user.folder / "tree").strip()
    name, first, second = f"kubo+{own_node.api_url}", user.folder / "first.car", user.folder / "second.car"
    user.run("export", "--from", name, cid, first)
    with user.mounted("--from", name):
        user.run("prefetch", cid)
        own_node.stop()
        assert "exporting:" in on_terminal(user, "export", cid, second)
    assert second.read_bytes() == first.read_bytes()


def test_an_empty_status_and_an_empty_listing(capsys: pytest.CaptureFixture[str]) -> None:
    console.status({"uptime": 2.5, "cache": {"budget": 1 << 30, "trouble": ""}, "pins": {}, "sources": []})
    console.ls({"entries": [], "small": {"blocks": 0, "bytes": 0}})
    assert (
        capsys.readouterr().out
        == "uptime: 2.5\ncache:\n  budget: 1.0 GiB\n  trouble: -\npins: none\nsources: "
        "none\n"
    )


def test_a_home_that_is_not_a_folder_is_an_error_only_where_it_is_needed(user: Home) -> None:
    """The home of a system user is /dev/null."""
    (user.folder / "f").write_text("x")
    cid = user.add(user.folder / "f")
    user.env["HOME"] = os.devnull
    assert user.run("cat", cid).stdout == "x"
    user.run("config")
    del user.env["IPFSFUSE_LIBRARY"]
    user.refused(
        "add",
        user.folder / "f",
        names="/dev/null/.local/share/ipfsfuse/library can't be made: Not a directory; give --library",
    )
    user.refused(
        "add",
        user.folder / "f",
        "--library",
        user.folder / "f",
        names="it is not a folder; give --library another",
    )


@pytest.mark.parametrize(
    "arguments",
    [["add", "."], ["get", "bafkqaaa"], ["mount", "here"], ["cat", "--from", "x.car", "bafkqaaa"]],
)
def test_a_working_directory_that_is_gone_is_named(user: Home, arguments: list[str]) -> None:
    gone = user.folder / "gone"
    gone.mkdir()
    shell = ["bash", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(gone)]
    code = 2 if "--from" in arguments else 1
    user.refused(*arguments, names="the working directory is gone: cd to another", code=code, wrapper=shell)
