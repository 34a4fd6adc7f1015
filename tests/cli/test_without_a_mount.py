"""`get`, `pin ls`, completions and man pages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounting import Home

CID = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
TOP = Path(__file__).parents[2]


@pytest.fixture
def tree(user: Home) -> tuple[Path, str]:
    folder = user.folder / "tree"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "big").write_bytes(os.urandom(3_000_000))
    (folder / "hello").write_text("hello\n")
    (folder / "link").symlink_to("hello")
    return folder, user.add(folder)


def test_get_copies_a_tree_and_overwrites_nothing(user: Home, tree: tuple[Path, str]) -> None:
    folder, cid = tree
    target = user.folder / "copy"
    assert user.json("get", cid, "-o", target, "--json")["files"] == 2
    subprocess.run(["diff", "-r", "--no-dereference", folder, target], check=True)
    user.refused("get", cid, "-o", target / "hello", names="exists already", code=2)
    user.run("get", f"{cid}/hello", "-o", user.folder)
    assert (user.folder / "hello").read_text() == "hello\n"


@pytest.mark.fuse
def test_get_uses_the_mount_of_the_cache_folder(user: Home, tree: tuple[Path, str]) -> None:
    folder, cid = tree
    with user.mounted():
        user.run("get", cid, "-o", user.folder / "copy")
        subprocess.run(["diff", "-r", "--no-dereference", folder, user.folder / "copy"], check=True)


@pytest.mark.fuse
def test_pin_takes_many_and_pin_ls_lists_them(user: Home) -> None:
    cids = []
    for number in range(2):
        (user.folder / "f").write_text(str(number))
        cids.append(user.add(user.folder / "f"))
    with user.mounted():
        assert [each["pinned"] for each in user.json("pin", *cids, "--json")] == cids
        assert sorted(user.json("pin", "ls", "--json")["pinned"]) == sorted(cids)
        user.run("unpin", *cids)
        assert user.json("pin", "ls", "--json") == {"pinned": [], "paths": {}}


def test_completions_know_the_commands(user: Home) -> None:
    for shell in ("bash", "zsh"):
        assert "unmount" in user.run("completion", shell).stdout
    script = user.folder / "completion"
    script.write_text(user.run("completion", "bash").stdout)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("module", ["ipfsfuse.cli.parser:build_parser", "ipfsfuse_run.options:_parser"])
def test_man_pages_have_every_option(tmp_path: Path, module: str) -> None:
    """As `scripts/package man` makes them."""
    name, function = module.split(":")
    page = tmp_path / "page.1"
    tool = str(Path(sys.executable).with_name("argparse-manpage"))
    command = [tool, "--module", name, "--function", function, "--prog", "x", "--output", str(page)]
    env = {**os.environ, "PYTHONPATH": f"{TOP}:{TOP / 'runner'}"}
    subprocess.run(command, env=env, check=True, capture_output=True)
    text = page.read_text().replace("\\-", "-")
    options = {"--budget", "--bwlimit", "--watch"} if "cli" in name else {"--record", "--deterministic"}
    assert [each for each in sorted(options) if each not in text] == []


def test_json_of_every_command_tells_of_failures_too(user: Home, tree: tuple[Path, str]) -> None:
    _folder, cid = tree
    for command in (["status"], ["rm", CID], ["unmount", str(user.folder)], ["mount", "x", "--budget", "0"]):
        done = user.run(*command, "--json", check=False)
        told = json.loads(done.stdout)
        assert (told["code"], f"ipfsfuse: {told['error']}\n") == (done.returncode, done.stderr)
    (user.folder / "f").write_text("x")
    assert [each["name"] for each in user.json("add", "--json", user.folder / "f")] == ["f"]
    assert user.json("export", cid, user.folder / "x.car", "--json")["exported"] == cid
    assert user.json("rm", cid, "--json") == {"removed": cid, "name": "tree"}
