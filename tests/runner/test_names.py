"""`--ipns NAME`: the guest gets a folder with what the name points to when the run begins."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.kubo.node import Node
from tests.mounting import Home
from tests.runner.conftest import DEMO, Runner, lines
from tests.sources.ipns import NameServer, make, name_of

pytestmark = pytest.mark.fuse

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NAME = str(name_of(KEY))


def tree(home: Home) -> str:
    folder = home.folder / "tree"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_text("content\n")
    (folder / "sub" / "up").symlink_to("../beside")
    (folder / "beside").write_text("beside\n")
    (folder / "out").symlink_to("/etc")
    return home.add(folder)


def test_a_guest_gets_a_name_as_a_folder_and_not_as_a_symlink(
    home: Home, server: NameServer, build_guest: Callable[[str], Path]
) -> None:
    cid = tree(home)
    server.records[NAME] = make(KEY, f"/ipfs/{cid}/sub")
    run = Runner(home.env)
    options = "--from", "library", "--from", server.url, "--ipns", NAME
    assert set(lines(run(*options, build_guest("habits"), "ls", f"/ipns/{NAME}").stdout)) >= {"file", "up"}
    paths = [
        f"/ipns/{NAME}/file",
        f"/ipns/{NAME}/up",
        f"/ipns/{NAME}/../file",
        "/ipns/other/file",
        f"/ipfs/{cid}/beside",
    ]
    output = [line for line in lines(run(*options, build_guest("reach"), *paths).stdout) if line]
    assert output[0] == f"{paths[0]}: content"
    assert [": errno " in line for line in output[1:4]] == [True] * 3
    assert output[4] == f"{paths[4]}: beside"
    assert {"ipfs", "ipns"} <= set(lines(run(*options, build_guest("habits"), "ls", "/").stdout))


def test_a_name_leads_only_into_the_mount_whatever_its_owner_published(
    home: Home, server: NameServer
) -> None:
    cid = tree(home)
    run = Runner(home.env)
    command = (
        "--from",
        "library",
        "--from",
        server.url,
        "--ipns",
        NAME,
        DEMO / "reader-p1.wat",
        f"/ipns/{NAME}/hostname",
    )
    for sequence, path in enumerate(("out", "sub/file", "nowhere")):
        server.records[NAME] = make(KEY, f"/ipfs/{cid}/{path}", sequence)
        done = run(*command)
        assert (done.returncode, done.stdout) == (125, b"")
        assert done.stderr.startswith(b"ipfsfuse-run: ")


def test_unresolvable_names_and_conflicting_options_are_refused(home: Home, server: NameServer) -> None:
    run = Runner(home.env)
    reader = DEMO / "reader-p1.wat"
    done = run("--from", server.url, "--ipns", NAME, reader, "x")
    assert done.returncode == 125
    assert NAME.encode() in done.stderr
    for options in (
        ["--ipns", "a/b"],
        ["--ipns", NAME, "--record", "x.car"],
        ["--ipns", NAME, "--mount", "/"],
    ):
        assert run(*options, reader, "x").returncode == 2
    server.records[NAME] = make(KEY, f"/ipfs/{tree(home)}/sub")
    clash = ["--from", "library", "--from", server.url, "--ipns", NAME, "--dir", f"{home.folder}::/ipns/x"]
    assert run(*clash, reader, "x").returncode == 2


@pytest.mark.kubo
def test_a_guest_reads_paths_through_dag_cbor(
    home: Home, kubo_node: Node, build_guest: Callable[[str], Path]
) -> None:
    file = kubo_node.add(b"a file")
    node = {"file": {"/": file}, "list": [1, "two"]}
    root = kubo_node.cmd("dag", "put", stdin=json.dumps(node))
    paths = [f"/ipfs/{root}/{name}" for name in ("file", "list/0", "list/1")]
    output = Runner(home.env)("--from", kubo_node.gateway_url, build_guest("reach"), *paths).stdout
    assert [line for line in lines(output) if line] == [
        f"{path}: {content}" for path, content in zip(paths, ("a file", "1", "two"), strict=True)
    ]
