"""Paths through dag-cbor and dag-json: on real mounts, of what a real Kubo node made."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import trio

import ipfsfuse
from ipfsfuse.dag import cid as cids
from tests.faults.gateway import errno_of
from tests.importer.test_import import write_car
from tests.kubo.node import Node
from tests.mounting import Home, Mounted
from tests.serve.conftest import serving
from tests.sources.libraries import multihash


def made(node: Node, codec: str) -> str:
    """A root of that codec."""
    file, large = node.add(b"a file"), node.add(os.urandom(3 << 20), "--chunker=size-262144")
    folder = node.cmd("add", "-Q", "-r", str(_folder(node)))
    deeper = node.cmd("dag", "put", f"--store-codec={codec}", stdin=json.dumps({"up": {"/": file}}))
    whole = {
        "bytes": {"/": {"bytes": "AP8"}},
        "deeper": {"/": deeper},
        "file": {"/": file},
        "folder": {"/": folder},
        "large": {"/": large},
        "list": [1, "two", {"three": {"/": file}}],
        "text": "words\n" * 50_000,
        "truth": True,
        "umlaut ü": {"nested": {"twice": "yes"}},
    }
    return node.cmd("dag", "put", f"--store-codec={codec}", stdin=json.dumps(whole))


def _folder(node: Node) -> Path:
    folder = node.folder / "folder"
    folder.mkdir(exist_ok=True)
    (folder / "in folder").write_text("inside")
    return folder


FILES = ("file", "large", "deeper/up", "folder/in folder", "list/2/three")
VALUES = {
    "bytes": b"\0\xff", "list/0": b"1", "list/1": b"two", "text": b"words\n" * 50_000, "truth": b"true",
    "umlaut ü/nested/twice": b"yes",
}  # fmt: skip


def check(path: Path, node: Node, root: str) -> None:
    """All that Kubo's command line finds below `root` is at `path`."""
    names = ["bytes", "deeper", "file", "folder", "large", "list", "text", "truth", "umlaut ü"]
    assert sorted(os.listdir(path)) == names
    for name in FILES:
        assert (path / name).read_bytes() == node.cmd("cat", f"/ipfs/{root}/{name}", text=False), name
    for name, content in VALUES.items():
        assert (path / name).read_bytes() == content
        assert (path / name).stat().st_size == len(content)
    assert sorted(os.listdir(path / "list")) == ["0", "1", "2"]
    assert stat.S_ISDIR((path / "umlaut ü" / "nested").stat().st_mode)
    for missing in ("nothing", "list/3", "list/x", "umlaut ü/x"):
        assert errno_of(path / missing) == "ENOENT"
    assert errno_of(path / "truth" / "x") == "ENOTDIR"
    assert subprocess.run(["cp", "-r", path, path.parents[1] / "copy"], capture_output=True).returncode == 0
    shutil.rmtree(path.parents[1] / "copy")


@pytest.mark.parametrize("codec", ["dag-cbor", "dag-json"])
def test_a_mount_shows_the_paths_that_kubo_finds(home: Home, kubo_node: Node, codec: str) -> None:
    root = made(kubo_node, codec)
    home.env["IPFS_PATH"] = str(kubo_node.repo)  # read in place
    for source in (f"kubo+{kubo_node.api_url}", kubo_node.gateway_url, "kubo"):
        with home.mounted("--isolated", "--from", source) as mount:
            check(mount.path / root, kubo_node, root)
            for name in ("deeper", "file", "folder", "large"):
                told = json.loads(kubo_node.cmd("dag", "resolve", "--enc=json", f"/ipfs/{root}/{name}"))
                assert os.getxattr(mount.path / root / name, "ipfs.cid").decode() == told["Cid"]["/"]
            own = os.getxattr(mount.path / root / "umlaut ü" / "nested", "ipfs.cid").decode()
            assert (mount.path / own / "twice").read_bytes() == b"yes"
    block = kubo_node.cmd("block", "get", root, text=False)
    told_raw = subprocess.run(
        [sys.executable, "-m", "ipfsfuse", "cat", "--raw", root, "--from", kubo_node.gateway_url],
        env=home.env,
        capture_output=True,
    )
    assert (told_raw.returncode, told_raw.stdout) == (0, block)


@pytest.mark.parametrize("codec", ["dag-cbor", "dag-json"])
def test_commands_go_through_such_blocks_too(home: Home, kubo_node: Node, codec: str) -> None:
    root = made(kubo_node, codec)
    source = ("--from", f"kubo+{kubo_node.api_url}")
    with home.mounted(*source) as mount:
        told = home.json("prefetch", "--json", root)
        assert (told["files"], told["directories"]) == (9, 7)
        home.run("pin", root)
        assert root in home.run("pin", "ls").stdout
        car = home.folder / "all.car"
        home.run("export", root, car)
        assert car.read_bytes() == kubo_node.cmd("dag", "export", "--progress=false", root, text=False)
        os.kill(mount.pid, signal.SIGKILL)
        subprocess.run(["fusermount3", "-u", "-z", mount.path], check=False)  # auto_unmount may be first
    with home.mounted("--offline") as mount:
        check_offline(mount, root)
        home.run("fsck")
    told = home.run("cat", f"/ipfs/{root}/list/1", *source).stdout
    assert told == "two"
    assert home.run("cat", f"/ipfs/{root}/deeper/up", *source).stdout == "a file"
    home.run("import", car)
    home.run("fsck", "--library")
    assert home.run("cat", f"{root}/umlaut ü/nested/twice").stdout == "yes"


async def _through_python(home: Home, root: str, source: str) -> None:
    async with ipfsfuse.open_filesystem(isolated=True, library=home.library, sources=[source]) as fs:
        assert [entry.name for entry in await fs.ls(f"{root}/list")] == ["0", "1", "2"]
        assert (await fs.stat(f"{root}/umlaut ü")).kind == "directory"
        for name, content in VALUES.items():
            assert (await fs.stat(f"{root}/{name}")).size == len(content)
            assert await fs.read_bytes(f"{root}/{name}") == content
        assert await fs.read_bytes(f"{root}/deeper/up") == b"a file"
        inside = (await fs.ls(f"{root}/umlaut ü"))[0]
        assert await fs.read_bytes(f"{inside.cid}/twice") == b"yes"


@pytest.mark.parametrize("codec", ["dag-cbor", "dag-json"])
def test_python_programs_other_hosts_and_a_second_node_read_them(
    home: Home, kubo_node: Node, codec: str
) -> None:
    root = made(kubo_node, codec)
    trio.run(_through_python, home, root, kubo_node.gateway_url)
    car = home.folder / "all.car"
    car.write_bytes(kubo_node.cmd("dag", "export", "--progress=false", root, text=False))
    home.run("import", car)
    with serving(home, "--listen", "127.0.0.1:0") as server:
        raw = server.ask(f"/ipfs/{root}?format=raw")
        assert (raw.status, raw.body) == (200, kubo_node.cmd("block", "get", root, text=False))
        for path in ("/deeper/up", "/list/2/three", "/umlaut ü/nested"):
            target = urllib.parse.quote(f"/ipfs/{root}{path}") + "?format=car&dag-scope=entity"
            ours = server.ask(target)
            theirs = urllib.request.urlopen(kubo_node.gateway_url + target).read()
            assert ours.body == theirs, path
        whole = server.ask(f"/ipfs/{root}?format=car").blocks()
        assert len(whole) == len(set(whole)) > 15
        with home.mounted("--isolated", "--from", server.url) as mount:
            check(mount.path / root, kubo_node, root)


def test_blocks_that_break_the_rules_are_errors_and_never_end_the_mount(home: Home) -> None:
    """Made without a node: Kubo refuses to store most of them."""
    deep, much = b"\x81" * 200 + b"\x01", b"\x9a\x00\x10\x00\x00" + b"\x00" * 0x100000
    bad = {
        "EIO": [b"\xa1", b"\xa2\x61b\x01\x61a\x02", b"\x81" * 100_000, b"\x18\x01", b"\xc1\x01"],
        "ENOTSUP": [deep, much],
    }
    blocks = [
        (error, cids.make(cids.DAG_CBOR, multihash(block)), block)
        for error, of in bad.items()
        for block in of
    ]
    other = cids.text(cids.value(blocks[0][1], 7))
    car = write_car(home.folder / "bad.car", [], [(cid, block) for _error, cid, block in blocks])
    with home.mounted("--from", car) as mount:
        for error, cid, _block in blocks:
            assert errno_of(mount.path / cids.text(cid)) == error
        assert errno_of(mount.path / other) == "EIO"
        assert errno_of(mount.path / cids.text(cids.value(cids.make(cids.RAW, multihash(b"")), 0))) == "EIO"
    for _error, cid, block in blocks:
        raw = [sys.executable, "-m", "ipfsfuse", "cat", "--raw", cids.text(cid), "--from", str(car)]
        assert subprocess.run(raw, env=home.env, capture_output=True).stdout == block


def check_offline(mount: Mounted, root: str) -> None:
    for name, content in VALUES.items():
        assert (mount.path / root / name).read_bytes() == content
    assert (mount.path / root / "deeper" / "up").read_bytes() == b"a file"
    assert len((mount.path / root / "large").read_bytes()) == 3 << 20
