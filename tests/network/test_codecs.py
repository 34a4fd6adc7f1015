"""Paths through dag-cbor and dag-json blocks that a real Kubo node made, on real mounts."""

import functools
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

import trio

import ipfsfuse
from ipfsfuse.dag import cid as cids
from tests.faults.gateway import errno_of
from tests.importer.test_import import write_car
from tests.kubo.node import Node
from tests.mounting import Home
from tests.serve.conftest import serving
from tests.sources.libraries import multihash

CODECS = ("dag-cbor", "dag-json")


@functools.cache
def add_mixed_dag(node: Node) -> str:
    """A dag-cbor root that links one tree of each codec by the name of the codec."""
    links = {codec: {"/": _tree(node, codec)} for codec in CODECS}
    return node.cmd("dag", "put", stdin=json.dumps(links))


def _tree(node: Node, codec: str) -> str:
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


@functools.cache
def kubo_cat(node: Node, path: str) -> bytes:
    """What `ipfs cat` prints."""
    query = urllib.parse.urlencode({"arg": path})
    request = urllib.request.Request(f"{node.api_url}/api/v0/cat?{query}", method="POST")
    with urllib.request.urlopen(request) as answer:
        return bytes(answer.read())


def check_tree(whole: Path, node: Node, root: str) -> None:
    """All that Kubo finds below `root` is at `whole`."""
    assert sorted(os.listdir(whole)) == sorted(CODECS)
    names = ["bytes", "deeper", "file", "folder", "large", "list", "text", "truth", "umlaut ü"]
    for codec in CODECS:
        path = whole / codec
        assert sorted(os.listdir(path)) == names
        for name in FILES:
            assert (path / name).read_bytes() == kubo_cat(node, f"/ipfs/{root}/{codec}/{name}"), name
        for name, content in VALUES.items():
            assert (path / name).read_bytes() == content
            assert (path / name).stat().st_size == len(content)
        assert sorted(os.listdir(path / "list")) == ["0", "1", "2"]
        assert stat.S_ISDIR((path / "umlaut ü" / "nested").stat().st_mode)
        for missing in ("nothing", "list/3", "list/x", "umlaut ü/x"):
            assert errno_of(path / missing) == "ENOENT"
        assert errno_of(path / "truth" / "x") == "ENOTDIR"
    copy = whole.parents[1] / "copy"
    assert subprocess.run(["cp", "-r", whole, copy], capture_output=True).returncode == 0
    shutil.rmtree(copy)


def test_a_mount_shows_the_paths_that_kubo_finds(home: Home, kubo_node: Node) -> None:
    root = add_mixed_dag(kubo_node)
    home.env["IPFS_PATH"] = str(kubo_node.repo)  # read in place
    for source in (f"kubo+{kubo_node.api_url}", kubo_node.gateway_url, "kubo"):
        with home.mounted("--isolated", "--from", source) as mount:
            check_tree(mount.path / root, kubo_node, root)
            for codec in CODECS:
                path = mount.path / root / codec
                for name in ("deeper", "file", "folder", "large"):
                    resolved = kubo_node.rpc("dag/resolve", arg=f"/ipfs/{root}/{codec}/{name}")
                    assert os.getxattr(path / name, "ipfs.cid").decode() == resolved["Cid"]["/"]
                own = os.getxattr(path / "umlaut ü" / "nested", "ipfs.cid").decode()
                assert (mount.path / own / "twice").read_bytes() == b"yes"
    tree = kubo_node.rpc("dag/resolve", arg=f"/ipfs/{root}/dag-json")["Cid"]["/"]
    printed = subprocess.run(
        [sys.executable, "-m", "ipfsfuse", "cat", "--raw", tree, "--from", kubo_node.gateway_url],
        env=home.env,
        capture_output=True,
    )
    block = kubo_node.cmd("block", "get", tree, text=False)
    assert (printed.returncode, printed.stdout) == (0, block)


def test_commands_follow_paths_through_dag_cbor_and_dag_json(home: Home, kubo_node: Node) -> None:
    root = add_mixed_dag(kubo_node)
    source = ("--from", f"kubo+{kubo_node.api_url}")
    with home.mounted(*source) as mount:
        fetched = home.json("prefetch", "--json", root)
        assert (fetched["files"], fetched["directories"]) == (16, 14)
        home.run("pin", root)
        assert root in home.run("pin", "ls").stdout
        car = home.folder / "all.car"
        home.run("export", root, car)
        assert car.read_bytes() == kubo_node.cmd("dag", "export", "--progress=false", root, text=False)
        os.kill(mount.pid, signal.SIGKILL)
        # auto_unmount may have unmounted it already
        subprocess.run(["fusermount3", "-u", "-z", mount.path], check=False)
    with home.mounted("--offline") as mount:
        for codec in CODECS:
            check_offline(mount.path / root / codec)
        home.run("fsck")
    assert home.run("cat", f"/ipfs/{root}/dag-json/list/1", *source).stdout == "two"
    assert home.run("cat", f"/ipfs/{root}/dag-cbor/deeper/up", *source).stdout == "a file"
    home.run("import", car)
    home.run("fsck", "--library")
    assert home.run("cat", f"{root}/dag-json/umlaut ü/nested/twice").stdout == "yes"


async def _through_python(home: Home, root: str, source: str) -> None:
    async with ipfsfuse.open_filesystem(isolated=True, library=home.library, sources=[source]) as fs:
        for codec in CODECS:
            path = f"{root}/{codec}"
            assert [entry.name for entry in await fs.ls(f"{path}/list")] == ["0", "1", "2"]
            assert (await fs.stat(f"{path}/umlaut ü")).kind == "directory"
            for name, content in VALUES.items():
                assert (await fs.stat(f"{path}/{name}")).size == len(content)
                assert await fs.read_bytes(f"{path}/{name}") == content
            assert await fs.read_bytes(f"{path}/deeper/up") == b"a file"
            inside = (await fs.ls(f"{path}/umlaut ü"))[0]
            assert await fs.read_bytes(f"{inside.cid}/twice") == b"yes"


def test_the_python_interface_and_other_hosts_read_dag_cbor_and_dag_json(home: Home, kubo_node: Node) -> None:
    root = add_mixed_dag(kubo_node)
    trio.run(_through_python, home, root, kubo_node.gateway_url)
    car = home.folder / "all.car"
    car.write_bytes(kubo_node.cmd("dag", "export", "--progress=false", root, text=False))
    home.run("import", car)
    with serving(home, "--listen", "127.0.0.1:0") as server:
        raw = server.ask(f"/ipfs/{root}?format=raw")
        assert (raw.status, raw.body) == (200, kubo_node.cmd("block", "get", root, text=False))
        for path in ("dag-cbor/deeper/up", "dag-json/list/2/three", "dag-json/umlaut ü/nested"):
            target = urllib.parse.quote(f"/ipfs/{root}/{path}") + "?format=car&dag-scope=entity"
            ours = server.ask(target)
            with urllib.request.urlopen(kubo_node.gateway_url + target) as theirs:
                assert ours.body == theirs.read(), path
        whole = server.ask(f"/ipfs/{root}?format=car").blocks()
        assert len(whole) == len(set(whole)) > 30
        with home.mounted("--isolated", "--from", server.url) as mount:
            check_tree(mount.path / root, kubo_node, root)


def test_malformed_blocks_give_errors_and_never_end_the_mount(home: Home) -> None:
    """The blocks are made without a node: Kubo refuses to store most of them."""
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
    for _error, cid, block in (blocks[0], blocks[-1]):
        raw = [sys.executable, "-m", "ipfsfuse", "cat", "--raw", cids.text(cid), "--from", str(car)]
        assert subprocess.run(raw, env=home.env, capture_output=True).stdout == block


def check_offline(tree: Path) -> None:
    for name, content in VALUES.items():
        assert (tree / name).read_bytes() == content
    assert (tree / "deeper" / "up").read_bytes() == b"a file"
    assert len((tree / "large").read_bytes()) == 3 << 20
