"""`export`: CARs of verified blocks in a fixed order. A real Kubo imports them and returns the same tree."""

import os
import subprocess
from pathlib import Path

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import PROFILES
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere, StoreFailed, Unsupported, WrongBlock
from ipfsfuse.importer.add import AddOptions, add
from ipfsfuse.importer.export import export
from ipfsfuse.sources.local.car_file import CarFile, sections
from ipfsfuse.sources.local.in_place import CarSource, LibrarySource
from ipfsfuse.sources.local.library import Library
from tests.importer.repo import Repo
from tests.importer.trees import LINKS, Bytes, Dir, at_threshold, write
from tests.kubo.fixtures import need_kubo
from tests.sources.libraries import multihash, parent, raw

MIB = 1 << 20


def some_tree(folder: Path) -> Path:
    files = {
        "small": Bytes(10),
        "empty": Bytes(0),
        "large": Bytes(3 * MIB + 5, 3),
        "same": Bytes(10),
        "ünï 🦊": Bytes(77, 4),
    }
    wide = at_threshold(PROFILES["unixfs-v1-2025"], 1)
    write(
        Dir({**files, "sub": Dir({"more": Dir(files), "nothing": Dir(), "links": Dir(LINKS)}), "wide": wide}),
        folder / "tree",
    )
    return folder / "tree"


def added(tree: Path, library: Library, profile: str = "unixfs-v1-2025") -> Cid:
    *_below, root = add([str(tree)], AddOptions(PROFILES[profile], hidden=True), library)
    return root.cid


def exported(root: Cid, library: Library, file: Path, indexed: bool = False) -> int:
    async def main() -> int:
        source = LibrarySource(Library(library.folder))
        try:
            return await export(root, source.get, file, indexed)
        finally:
            await source.aclose()

    return trio.run(main)


@pytest.mark.parametrize("indexed", [False, True], ids=["v1", "v2"])
def test_a_car_has_every_block_once_parents_first(indexed: bool, tmp_path: Path, library: Library) -> None:
    root = added(some_tree(tmp_path), library)
    file = tmp_path / "out.car"
    size = exported(root, library, file, indexed)
    car = CarFile(file)
    assert car.roots == (root,)
    assert car.use_own_index() == indexed
    found = list(sections(car))
    assert found[0].cid == root
    multihashes = [cids.multihash(section.cid) for section in found]
    assert len(set(multihashes)) == len(multihashes)
    stored = [section for path in library.folder.glob("*.car") for section in sections(CarFile(path))]
    assert set(multihashes) == {cids.multihash(section.cid) for section in stored}
    assert size == car.data_end - car.data_offset

    async def main() -> None:
        source = CarSource.open(file, tmp_path / "indexes")
        for section in found:
            cids.verify(section.cid, await source.get(section.cid))
        await source.aclose()

    trio.run(main)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_two_exports_are_the_same_bytes(tmp_path: Path, library: Library) -> None:
    root = added(some_tree(tmp_path), library)
    exported(root, library, tmp_path / "one.car")
    exported(root, library, tmp_path / "two.car")
    assert (tmp_path / "one.car").read_bytes() == (tmp_path / "two.car").read_bytes()


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, library: Library) -> None:
    root = added(some_tree(tmp_path), library)
    file = tmp_path / "out.car"
    file.write_bytes(b"as it was")
    asked = 0

    async def get(cid: Cid) -> bytes:
        nonlocal asked
        asked += 1
        if asked >= 5:
            raise NotHere("gone")
        return library.block(cid)

    async def wrong(cid: Cid) -> bytes:
        return library.block(cid) if cid == root else b"something else"

    for getter, error in ((get, NotHere), (wrong, WrongBlock)):
        with pytest.raises(error):
            trio.run(export, root, getter, file)
        assert file.read_bytes() == b"as it was"
        assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_files_that_can_not_be_written_and_unknown_codecs_are_named(tmp_path: Path, library: Library) -> None:
    root = added(some_tree(tmp_path), library)
    with pytest.raises(StoreFailed, match=r"none/out\.car: No such file"):
        exported(root, library, tmp_path / "none" / "out.car")

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link", "."):
        with pytest.raises(StoreFailed, match="exists and is not a file"):
            exported(root, library, tmp_path / name)
    assert (tmp_path / "link").is_symlink()

    async def get(_cid: Cid) -> bytes:
        return b"{}"

    git = cids.make(0x78, multihash(b"{}"))
    with pytest.raises(Unsupported, match="git-raw"):
        trio.run(export, git, get, tmp_path / "out.car")


def blocks_of_export(root: Cid, blocks: list[tuple[Cid, bytes]], file: Path) -> list[bytes]:
    """The multihashes in the CAR of `root`, in order."""
    by_hash = {cids.multihash(cid): block for cid, block in blocks}

    async def get(cid: Cid) -> bytes:
        return by_hash[cids.multihash(cid)]

    trio.run(export, root, get, file)
    car = CarFile(file)
    found = [cids.multihash(section.cid) for section in sections(car)]
    car.close()
    return found


def test_a_block_that_is_linked_as_raw_and_as_dag_pb_is_exported_with_its_children(tmp_path: Path) -> None:
    leaf = raw(1)
    node = parent([leaf])
    as_bytes = (cids.make(cids.RAW, cids.multihash(node[0])), node[1])
    root = parent([as_bytes, node])
    found = blocks_of_export(root[0], [leaf, node, root], tmp_path / "out.car")
    assert found == [cids.multihash(cid) for cid, _block in (root, node, leaf)]


def test_blocks_that_dag_cbor_links_are_exported(tmp_path: Path) -> None:
    leaf = raw(1)
    block = b"\xa1\x61x\xd8\x2a\x58\x25\0" + leaf[0]
    root = (cids.make(cids.DAG_CBOR, multihash(block)), block)
    found = blocks_of_export(root[0], [leaf, root], tmp_path / "out.car")
    assert found == [cids.multihash(cid) for cid, _block in (root, leaf)]


@pytest.mark.parametrize("profile", PROFILES)
def test_kubo_imports_our_cars_and_returns_the_same_tree(
    profile: str, tmp_path: Path, library: Library
) -> None:
    need_kubo()
    tree = some_tree(tmp_path)
    root = added(tree, library, profile)
    repo = Repo(tmp_path / "repo", profile)
    for indexed in (False, True):
        file = tmp_path / f"{indexed}.car"
        exported(root, library, file, indexed)
        assert cids.text(root) in repo.run("dag", "import", "--pin-roots", file)
    for pack in library.folder.glob("*.car"):
        repo.run("dag", "import", "--pin-roots=false", pack)
    repo.run("get", "--offline", "-o", tmp_path / "back", cids.text(root))
    assert (
        subprocess.run(
            ["diff", "-r", "--no-dereference", tree, tmp_path / "back"], capture_output=True, check=False
        ).stdout
        == b""
    )
    with open(tmp_path / "kubo.car", "wb") as out:
        out.write(repo.run_raw("dag", "export", "--offline", cids.text(root)))
    assert (tmp_path / "kubo.car").read_bytes() == (tmp_path / "False.car").read_bytes()
