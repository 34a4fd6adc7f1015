"""The folder of a guest's results in the library, in a record and in a replay; and signatures of records."""

import io
import json
import os
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import Built
from ipfsfuse.errors import StoreFailed
from ipfsfuse_run import host_folders, receipts
from ipfsfuse_run.errors import ReceiptRefused
from ipfsfuse_run.record import RecordWriter, add_tree, open_car, tree_cid
from tests.kubo.node import Node
from tests.mounting import Home
from tests.runner.conftest import Measured, Runner, lines, with_command
from tests.runner.recorded import Blocks

MIB = 1 << 20


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Runner:
    return Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg")})


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A private key in OpenSSH's format, and its public key in OpenSSL's format."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / name, folder / f"{name}.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


def refused(run: Runner, *args: str | Path, code: int = 125, names: str = "") -> None:
    done = run(*args)
    assert (done.returncode, done.stdout, len(lines(done.stderr))) == (code, b"", 1), done
    assert names in done.stderr.decode()


@pytest.mark.fuse
def test_results_go_to_the_library(run: Runner, home: Home, tmp_path: Path, habits: Path) -> None:
    out, cid_file = tmp_path / "out", tmp_path / "cid"
    done = run("--offline", "--out", out, "--add", "--cid-file", cid_file, habits, "write", "/out/.result")
    cid = cid_file.read_text()
    assert (done.returncode, lines(done.stderr)) == (0, [f"ipfsfuse-run: results /ipfs/{cid}"])
    assert run("--offline", habits, "cat", f"/ipfs/{cid}/.result").stdout == b"written\n"
    assert home.run("add", "-Q", "--hidden", out).stdout.strip() == cid
    refused(run, "--out", tmp_path / "b", "--cid-file", cid_file, habits, "args", code=2, names=str(cid_file))
    assert not (tmp_path / "b").exists()


@pytest.mark.fuse
def test_many_small_results_take_little_time_and_memory(
    home: Home, tmp_path: Path, habits: Path, wasmtime: Path
) -> None:
    """Hashing takes about 30 us and 1 KiB for each of the 20,000 names, and importing takes as much again."""
    env = with_command(home.env, tmp_path, wasmtime)
    run, out, cid_file = Runner(env), tmp_path / "out", tmp_path / "cid"
    options = ("--offline", "--engine", "command", "--out", out, "--add", "--cid-file", cid_file)
    done = Measured(run.command(*options, habits, "names", "/out", "20000"), run.env)
    assert (done.code, done.err) == (0, f"ipfsfuse-run: results /ipfs/{cid_file.read_text()}\n")
    assert len(os.listdir(out)) == 20_000
    assert done.memory < 200 << 20
    assert done.seconds < 30
    assert home.run("add", "-Q", "--hidden", out).stdout.strip() == cid_file.read_text()


@pytest.mark.fuse
def test_a_signed_record_with_results(run: Runner, home: Home, tmp_path: Path, habits: Path) -> None:
    """The run is recorded and signed, and repeated from the CAR alone. Its parts are extracted."""
    target, (private, public), (_other, other_public) = (
        tmp_path / "run.car",
        key_pair(tmp_path, "key"),
        key_pair(tmp_path, "other"),
    )
    options = ("--env", "TOKEN=secret", "--out", tmp_path / "out", "--sign", private)
    done = run("--record", target, *options, habits, "write", "/out/result")
    assert (done.returncode, target.stat().st_mode & 0o777) == (0, 0o600), done
    assert b"secret" not in target.read_bytes()
    (line,) = lines(done.stderr)
    cid = line.rpartition("/")[2]

    refused(run, "--replay", target, names="--env TOKEN=VALUE")
    refused(run, "--replay", target, "--env", "TOKEN=other", names="another value")
    again = run(*("--replay", target, "--env", "TOKEN=secret", "--key", public, "--out", tmp_path / "again"))
    assert (again.returncode, "out: the same" in lines(again.stdout)) == (0, True), again
    assert (tmp_path / "again" / "result").read_text() == "written\n"
    refused(
        run, "--replay", target, "--env", "TOKEN=secret", "--key", other_public, names="not signed by SHA256:"
    )

    shown = run.command("inspect", target)
    assert run("inspect", target, "out", tmp_path / "third").returncode == 0
    assert (tmp_path / "third" / "result").read_text() == "written\n"
    assert f"out: {cid}" in run("inspect", target).stdout.decode(), shown
    checked = run("inspect", target, "--key", public)
    assert (checked.returncode, "signed by SHA256:" in checked.stdout.decode()) == (0, True)
    refused(run, "inspect", target, "--key", other_public, code=1, names="not signed by SHA256:")
    envelope = json.loads(run("inspect", target, "signature").stdout)
    check_signature(envelope, public, other_public, cid)

    forged = tmp_path / "forged.car"
    forge(target, forged)
    assert run("--replay", forged, "--env", "TOKEN=secret").returncode == 3
    refused(run, "inspect", forged, "--key", public, code=1, names="of another receipt")


def check_signature(envelope: dict[str, object], public: Path, other_public: Path, cid: str) -> None:
    """Checks the signature with another implementation of DSSE."""
    dsse = pytest.importorskip("securesystemslib.dsse")
    signer = pytest.importorskip("securesystemslib.signer")
    read = dsse.Envelope.from_dict(envelope)
    (keyid,) = read.signatures

    def key(path: Path) -> object:
        return signer.SSlibKey.from_crypto(serialization.load_pem_public_key(path.read_bytes()), keyid)

    assert len(read.verify([key(public)], 1)) == 1
    with pytest.raises(Exception, match=r"[Ss]ignature"):
        read.verify([key(other_public)], 1)
    statement = json.loads(read.payload)
    subjects = {each["name"]: each["digest"] for each in statement["subject"]}
    assert set(subjects) == {"stdout", "stderr", "out", "out/result"}
    assert subjects["out"] == {"ipfsCid": cid}
    assert statement["predicate"]["format"] == 2


def forge(source: Path, target: Path) -> None:
    """Copies the record, with another exit code in its receipt. All its blocks are right."""
    with open_car(source) as record, target.open("w+b") as out:
        writer = RecordWriter(out)
        children = []
        for link in record.node(record._root).links:  # type: ignore[union-attr]
            name = link.name.decode()
            if name == receipts.RECEIPT:
                receipt = json.loads(record.receipt(link.cid))
                receipt["results"]["exit_code"] = 7
                children.append((name, writer.add_file(io.BytesIO(json.dumps(receipt).encode()))))
                continue
            children.append((name, Built(link.cid, 0, 0)))
        for multihash in record._locations:
            for codec in (cids.RAW, cids.DAG_PB):
                cid = cids.make(codec, multihash)
                writer.put(cid, record.block(cid))
        writer.close(writer.add_folder(children))


@pytest.mark.fuse
def test_inspect_gives_the_parts_of_a_record(run: Runner, tmp_path: Path, habits: Path) -> None:
    target, alone = tmp_path / "run.car", tmp_path / "run.json"
    run("--record", target, habits, "cat", stdin=b"\x1b[31mred")
    assert run("inspect", target, "stdout").stdout == b"\x1b[31mred"
    assert run("inspect", target, "stderr").stdout == b""
    assert "not signed" in run("inspect", target).stdout.decode()
    assert json.loads(run("inspect", target, "--json").stdout)["format"] == 2
    refused(run, "inspect", target, "signature", code=1, names="no signature")
    refused(run, "inspect", target, "out", tmp_path / "x", code=1, names="no /out")
    shown = run("--replay", target, "--show")
    assert (shown.returncode, shown.stdout) == (0, b"\x1b[31mred")
    assert "stdout: the same" in lines(shown.stderr)
    run("--record", alone, habits, "args")
    assert run("inspect", alone).returncode == 0
    refused(run, "inspect", alone, "stdout", code=1, names="a receipt alone")
    refused(run, "--replay", alone, names="a receipt alone")


@pytest.mark.kubo
@pytest.mark.fuse
def test_a_node_imports_a_record(
    run: Runner, home: Home, kubo_node: Node, tmp_path: Path, habits: Path
) -> None:
    """A record has only some blocks of a file. A node pins all below the roots, so no root may lead to such
    blocks."""
    (tmp_path / "big").write_bytes(os.urandom(5 * MIB))
    cid = home.add(tmp_path / "big")
    target = tmp_path / "run.car"
    run("--record", target, "--out", tmp_path / "out", habits, "cat", f"/ipfs/{cid}", "1")
    assert "Pinned root" in kubo_node.cmd("dag", "import", target)


# -- what a guest may leave, and what a record may claim ----------------------------------------------------


def test_results_bring_in_no_file_from_outside(tmp_path: Path) -> None:
    out, secret = tmp_path / "out", tmp_path / "secret"
    (out / "folder").mkdir(parents=True)
    secret.write_text("secret")
    (out / "link").symlink_to(secret)
    (out / "folder" / "up").symlink_to("../..")
    target = tmp_path / "x.car"
    with target.open("w+b") as file:
        writer = RecordWriter(file)
        built = add_tree(writer, str(out), MIB).built
        writer.close(built)
    assert b"secret" not in target.read_bytes().replace(os.fsencode(secret), b"")
    with open_car(target) as record:
        (tmp_path / "copy").mkdir()
        record.extract(built.cid, str(tmp_path / "copy"), MIB)
    assert os.readlink(tmp_path / "copy" / "link") == str(secret)
    for kind in (stat.S_IFIFO, stat.S_IFSOCK):
        os.mknod(out / "odd", kind | 0o600)
        with pytest.raises(StoreFailed, match="neither file, folder nor symlink"):
            tree_cid(str(out), MIB)
        (out / "odd").unlink()
    (out / "sparse").touch()
    os.truncate(out / "sparse", 1 << 40)
    with pytest.raises(StoreFailed, match="max-out"):
        tree_cid(str(out), MIB)
    os.truncate(out / "sparse", MIB // 4)
    for number in range(5):
        os.link(out / "sparse", out / f"again{number}")
    with pytest.raises(StoreFailed, match="max-out"):
        tree_cid(str(out), MIB)


def test_a_given_folder_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(2100):  # deeper than a path can be long
            os.mkdir("d", dir_fd=folder)
            folder, above = os.open("d", os.O_RDONLY, dir_fd=folder), folder
            os.close(above)
        with open(os.devnull, "wb") as nowhere, pytest.raises(StoreFailed, match="File name too long"):
            add_tree(RecordWriter(nowhere), str(tmp_path), None)
    finally:
        os.close(folder)
        host_folders.remove_tree(str(tmp_path / "d"))


SWAP = """
import os, sys
folder, link = sys.argv[1:]
os.symlink("../secret", link)
print(flush=True)
while True:
    os.rename(folder, folder + "-")
    os.rename(link, folder)
    os.rename(folder, link)
    os.rename(folder + "-", folder)
"""


def test_a_folder_that_is_swapped_for_a_symlink_during_the_import_is_not_followed(tmp_path: Path) -> None:
    """Another guest that has the same folder can do that."""
    out, secret, target = tmp_path / "out", tmp_path / "secret", tmp_path / "x.car"
    for folder in (out / "folder", secret):
        folder.mkdir(parents=True)
        for number in range(100):
            (folder / f"{number}").write_bytes(b"secret" if folder == secret else b"public")
    command = [sys.executable, "-c", SWAP, str(out / "folder"), str(out / "link")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as swapping:
        assert swapping.stdout is not None
        swapping.stdout.readline()
        try:
            for _ in range(20):
                with target.open("w+b") as file, suppress(StoreFailed):
                    add_tree(RecordWriter(file), str(out), MIB)
                assert b"\x01\x55\x12\x20" + sha256(b"secret").digest() not in target.read_bytes()
        finally:
            swapping.kill()


@pytest.mark.parametrize("fault", ["slash", "dots", "twice", "huge", "deep", "file"])
def test_results_that_no_folder_can_hold_are_refused(tmp_path: Path, fault: str) -> None:
    blocks = Blocks()
    leaf = blocks.put(b"data")
    root = {
        "slash": lambda: blocks.folder([(b"../x", leaf.cid)]),
        "dots": lambda: blocks.folder([(b"..", leaf.cid)]),
        "twice": lambda: blocks.folder([(b"a", leaf.cid), (b"a", leaf.cid)]),
        "huge": lambda: blocks.folder([(b"a", blocks.doubled(bytes(MIB), 30).cid)]),
        "deep": lambda: nested(blocks, 5000),
        "file": lambda: leaf,
    }[fault]()
    target = tmp_path / "x.car"
    with target.open("w+b") as file:
        writer = RecordWriter(file)
        for cid, block in blocks.all.items():
            writer.put(cid, block)
        writer.close(root)
    (tmp_path / "copy").mkdir()
    try:
        with open_car(target) as record, pytest.raises(ReceiptRefused):
            record.extract(root.cid, str(tmp_path / "copy"), 64 * MIB)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["copy", "x.car"]
    finally:
        host_folders.remove_tree(str(tmp_path / "copy"))  # pytest can't remove such deep folders


def nested(blocks: Blocks, depth: int) -> Built:
    folder = blocks.folder([])
    for _ in range(depth):
        folder = blocks.folder([(b"d", folder.cid)])
    return folder


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_a_key_with_a_passphrase_is_refused(run: Runner, tmp_path: Path, habits: Path) -> None:
    make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "words", "-f", str(tmp_path / "key")]
    subprocess.run(make, check=True)
    options = ("--record", tmp_path / "run.car", "--sign")
    refused(run, *options, tmp_path / "key", habits, "args", code=2, names="passphrase")
    refused(run, *options, tmp_path / "none", habits, "args", code=2, names="can't be read")
    assert not (tmp_path / "run.car").exists()
