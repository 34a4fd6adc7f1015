"""`import` and `fsck` of CAR files and of the library: blocks are verified, and only whole DAGs are kept."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.local.library import Library
from ipfsfuse.sources.local.library_compaction import MANY
from tests.mounting import Home, wait_until
from tests.sources.libraries import Pairs, add, multihash, parent, raw


def write_car(file: Path, roots: list[Cid], blocks: Pairs) -> Path:
    sections = b"".join(car.section_head(cid, len(block)) + block for cid, block in blocks)
    file.write_bytes(car.encode_header(roots) + sections)
    return file


def some_dag() -> Pairs:
    """Two files, a folder, the root."""
    leaves = [raw(1), raw(2)]
    inner = parent(leaves)
    return [*leaves, inner, parent([inner, leaves[0]])]


def run(home: Home, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return home.run(*arguments, check=False)


@pytest.mark.fuse
@pytest.mark.parametrize("version", ["--v2", None])
def test_an_exported_tree_is_imported_and_reads_the_same(tmp_path: Path, version: str | None) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "large").write_bytes(bytes(range(256)) * 10_000)
    (tmp_path / "tree" / "small").write_bytes(b"small")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    here, there = Home(tmp_path / "a"), Home(tmp_path / "b")
    root = here.run("add", "-Q", tmp_path / "tree").stdout.strip()
    here.run("export", root, tmp_path / "tree.car", *([version] if version else []))
    assert there.run("import", tmp_path / "tree.car").stdout == f"imported {root} tree\n"
    with there.mounted() as mount:
        subprocess.run(["diff", "-r", tmp_path / "tree", mount.path / root], check=True)
    listed = [json.loads(home.run("library", "--json").stdout)[0] for home in (here, there)]
    assert listed[0]["cid"] == listed[1]["cid"] == root


def test_a_car_that_lacks_a_block_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    home, blocks = Home(tmp_path), some_dag()
    root = blocks[-1][0]
    lacking = write_car(tmp_path / "lacking.car", [root], blocks[1:])
    done = run(home, "import", lacking)
    assert done.returncode == 1
    assert f"nothing was imported: {cids.text(blocks[0][0])} is neither in the CAR nor in the" in done.stderr
    assert json.loads(home.run("library", "--json").stdout) == []
    rest = write_car(tmp_path / "rest.car", [blocks[0][0]], blocks[:1])
    home.run("import", rest, lacking)
    assert {row["cid"] for row in json.loads(home.run("library", "--json").stdout)} == {
        cids.text(root),
        cids.text(blocks[0][0]),
    }
    assert home.run("fsck", "--library").stdout == f"every block of {home.library} is there and right\n"


def test_a_wrong_block_is_refused_and_named_by_its_path(tmp_path: Path) -> None:
    home, blocks = Home(tmp_path), some_dag()
    root = blocks[-1][0]
    blocks[1] = (blocks[1][0], blocks[1][1][:-1] + b"?")
    file = write_car(tmp_path / "wrong.car", [root], blocks)
    done = run(home, "import", file)
    assert (done.returncode, "nothing was imported" in done.stderr) == (1, True)
    done = run(home, "fsck", file)
    assert done.returncode == 1
    assert done.stdout.startswith(f"damaged: {cids.text(root)}/0/1: ")
    found = json.loads(run(home, "fsck", file, "--json").stdout)["damaged"]
    assert [each["path"] for each in found] == [f"{cids.text(root)}/0/1"]


def test_damage_of_the_library_is_named_by_its_path(tmp_path: Path) -> None:
    home, blocks = Home(tmp_path), some_dag()
    home.run("import", write_car(tmp_path / "good.car", [blocks[-1][0]], blocks))
    assert run(home, "fsck", "--library").returncode == 0
    assert "no mount" in run(home, "fsck").stderr, "without --library, `fsck` asks a mount"
    (pack,) = home.library.glob("*.car")
    data = pack.read_bytes()
    pack.write_bytes(data.replace(blocks[1][1], blocks[1][1][:-1] + b"?"))
    done = run(home, "fsck", "--library", home.library)
    assert done.returncode == 1
    assert done.stdout.startswith(f"damaged: {cids.text(blocks[-1][0])} good/0/1: ")
    home.run("import", tmp_path / "good.car")  # this repairs the pack
    assert pack.read_bytes() == data
    assert run(home, "fsck", "--library").returncode == 0
    (root,) = (home.library / "roots").iterdir()
    root.write_text(root.read_text()[:10])
    done = run(home, "fsck", "--library")
    assert done.returncode == 1
    assert done.stdout.startswith(f"damaged: {cids.text(blocks[-1][0])}: {root} can't be read")


@pytest.mark.parametrize("roots", [0, 1])
def test_a_file_that_can_not_be_imported_gives_one_line_of_error(tmp_path: Path, roots: int) -> None:
    home = Home(tmp_path)
    block = b"{}"
    git_root = (cids.make(0x78, multihash(block)), block)
    file = write_car(tmp_path / "odd.car", [git_root[0]][:roots], [git_root])
    (tmp_path / "text").write_text("not a CAR")
    for path, why in [
        (file, "git-raw" if roots else "names no roots"),
        (tmp_path / "text", "not a CAR"),
        (tmp_path / "none", "not a file"),
        (tmp_path, "not a file"),
    ]:
        done = run(home, "import", path)
        assert done.returncode == 1
        assert why in done.stderr
        assert done.stderr.count("\n") == 1


def test_cat_writes_files_and_blocks(tmp_path: Path) -> None:
    home, block = Home(tmp_path), b"\xa1\x61x\x01"
    cbor = (cids.make(cids.DAG_CBOR, multihash(block)), block)
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "large").write_bytes(bytes(range(256)) * 10_000)
    root = home.add(tmp_path / "tree")
    old = home.add("--profile", "unixfs-v0-2015", tmp_path / "tree" / "sub" / "large")

    def cat(*arguments: str | Path) -> bytes:
        command = [sys.executable, "-m", "ipfsfuse", "cat", *map(str, arguments)]
        return subprocess.run(command, env=home.env, stdout=subprocess.PIPE, check=True).stdout

    assert cat(f"/ipfs/{root}/sub/large") == cat(old) == bytes(range(256)) * 10_000
    file = write_car(tmp_path / "cbor.car", [cbor[0]], [cbor])
    assert cat("--raw", cids.text(cbor[0]), "--from", file) == block
    home.refused("cat", f"{root}/sub", names="is a directory")
    home.refused("cat", f"{root}/none", names="no such entry")
    home.refused("cat", "--raw", f"{root}/sub", names="a block has no path", code=2)
    wrong = write_car(tmp_path / "wrong.car", [cbor[0]], [(cbor[0], b"\xa1\x61x\x02")])
    done = run(home, "cat", "--raw", cids.text(cbor[0]), "--from", wrong)
    assert (done.returncode, done.stdout) == (1, "")
    assert "do not match its CID" in done.stderr


def test_a_library_is_backed_up_while_it_is_mounted_and_added_to(home: Home) -> None:
    """Runs the line in docs/SOURCES.md. Once, an `add` merged small packs between the two copies, and roots
    of the backup named packs that the backup did not have."""
    before = [home.add(_file(home, f"before-{number}")) for number in range(3)]
    backup, page = home.folder / "backup", Path("docs/SOURCES.md").read_text()
    library = Library(home.library)
    (line,) = [each.strip() for each in page.splitlines() if each.startswith("    flock ")]
    script = line.replace("LIBRARY", str(home.library)).replace("BACKUP", str(backup))
    roots_copied, added = home.folder / "roots_copied", home.folder / "added"
    script = script.replace("&&", f"&& touch {roots_copied} && until [ -e {added} ]; do sleep 0.05; done &&")
    adding = [sys.executable, "-m", "ipfsfuse", "add", "-Q"]
    with home.mounted("--from", "library") as mount:
        for turn in range(1, 3):
            backup.mkdir(mode=0o700, exist_ok=True)
            for number in range(MANY):
                add(library, [raw(1000 * turn + number)])
            copy = subprocess.Popen(["sh", "-c", script])
            new = _file(home, f"meanwhile-{time.monotonic_ns()}")
            wait_until(roots_copied.exists, "the roots are copied")
            subprocess.run([*adding, new], env=home.env, check=True, capture_output=True)
            added.touch()
            assert copy.wait() == 0
            roots_copied.unlink()
            added.unlink()
            assert all((mount.path / cid).read_text().startswith("before") for cid in before)
    shutil.rmtree(home.library)
    shutil.copytree(backup, home.library, symlinks=True)
    home.library.chmod(0o700)
    home.run("fsck", "--library")
    kept = home.json("library", "--json")
    assert {entry["cid"] for entry in kept} >= set(before)
    with home.mounted("--from", "library") as mount:
        for entry in kept:
            assert (mount.path / entry["cid"]).read_bytes()
    home.add(_file(home, "after"))


def _file(home: Home, name: str) -> Path:
    file = home.folder / name
    file.write_text(f"{name} " * 50_000)
    return file
