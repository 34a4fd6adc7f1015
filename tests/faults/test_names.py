"""Names: which are shown, which lead to the same inode, and which make the mount ask its sources."""

import os
import subprocess

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag.cid import Cid, make
from ipfsfuse.dag.nodes import Link
from ipfsfuse.dag.unixfs import Type, UnixFS
from tests.dagging import Dag
from tests.faults.gateway import errno_of, mounted
from tests.mounting import Home, wait_until


def test_names_that_no_file_system_can_hold_are_not_shown(home: Home) -> None:
    dag = Dag()
    leaf = dag.block(b"x")
    names = [
        b"",
        b".",
        b"..",
        b"a/b",
        b"../../etc",
        b"nul\0",
        b"n" * 256,
        b"fine",
        b"\xff\xfe raw bytes",
        b"n" * 255,
    ]
    root = dag.node([Link(leaf, name, 1) for name in names], UnixFS(type=Type.DIRECTORY))
    with mounted(home, dag) as (_, mount):
        folder = os.fsencode(mount.path / cids.text(root))
        assert sorted(os.listdir(folder)) == sorted([b"fine", b"\xff\xfe raw bytes", b"n" * 255])
        assert os.stat(folder + b"/..").st_ino == os.stat(mount.path).st_ino


def test_identity_cids_are_files_directories_and_links_without_a_request(home: Home) -> None:
    def identity(block: bytes, codec: int) -> Cid:
        return make(codec, bytes([multihashes.IDENTITY, len(block)]) + block)

    dag = Dag()
    raw = identity(b"inline", cids.RAW)
    scratch = Dag()
    folder_cid = scratch.directory({b"file": (raw, 6)})
    folder = identity(scratch.blocks[cids.multihash(folder_cid)], cids.DAG_PB)
    link_cid = scratch.symlink(b"file")
    outer = dag.directory(
        {
            b"folder": (folder, 1),
            b"link": (identity(scratch.blocks[cids.multihash(link_cid)], cids.DAG_PB), 1),
        }
    )
    with mounted(home, dag) as (gateway, mount):
        assert (mount.path / cids.text(raw)).read_bytes() == b"inline"
        assert (mount.path / cids.text(outer) / "folder" / "file").read_bytes() == b"inline"
        assert os.readlink(mount.path / cids.text(outer) / "link") == "file"
        assert list(gateway.asked) == [cids.text(outer)]


def test_a_listing_fetches_no_child(home: Home) -> None:
    dag = Dag()
    entries = {b"%03d" % n: (dag.block(b"%d" % n, cids.RAW), 3) for n in range(500)}
    entries[b"folder"] = (dag.directory({}), 4)
    root = dag.directory(entries)
    with mounted(home, dag) as (gateway, mount):
        assert len(os.listdir(mount.path / cids.text(root))) == 501
        subprocess.run(["ls", "-l", mount.path / cids.text(root)], check=True, capture_output=True)
        asked = set(gateway.asked) - {cids.text(root)}
        assert asked <= {cids.text(entries[b"folder"][0])}, "ls -l needs only the block of the folder"


def test_a_cid_that_was_opened_by_name_is_listed_while_it_is_staged(home: Home) -> None:
    dag = Dag()
    root = dag.directory({b"file": (dag.block(b"x"), 1)})
    with mounted(home, dag) as (_, mount):
        assert os.listdir(mount.path) == []
        assert os.listdir(mount.path / cids.text(root)) == ["file"]
        assert os.listdir(mount.path) == [cids.text(root)]
    with mounted(home, dag) as (_, mount):
        assert os.listdir(mount.path) == [cids.text(root)]


def test_a_cid_outside_the_allow_list_is_eacces_and_no_source_is_asked(home: Home) -> None:
    dag = Dag()
    inside = dag.block(b"inside")
    root, other = dag.directory({b"file": (inside, 6)}), dag.block(b"other")
    with mounted(home, dag, "--allow", cids.text(root)) as (gateway, mount):
        assert (mount.path / cids.text(root) / "file").read_bytes() == b"inside"
        assert errno_of(mount.path / cids.text(other)) == "EACCES"
        assert errno_of(mount.path / cids.text(inside)) == "EACCES", (
            "only allowed names, and paths below them, can be read"
        )
        assert set(gateway.asked) == {cids.text(root), cids.text(inside)}


def test_all_spellings_of_a_file_have_one_inode(home: Home) -> None:
    from multiformats import multibase

    dag = Dag()
    leaves = [b"l" * 1000, b"m" * 1000]
    v1 = dag.file(leaves)
    v0 = Cid(cids.multihash(v1))
    bases = [
        "base16",
        "base16upper",
        "base32",
        "base32upper",
        "base32hex",
        "base36",
        "base58btc",
        "base58flickr",
        "base64url",
        "base32z",
    ]
    spellings = [multibase.encode(v1, base) for base in bases] + [cids.text(v0)]
    with mounted(home, dag) as (gateway, mount):
        assert len({os.stat(mount.path / name).st_ino for name in spellings}) == 1
        assert {(mount.path / name).read_bytes() for name in spellings} == {b"".join(leaves)}
        assert sum(gateway.asked.values()) == 3, "all spellings together need one request for each block"


def test_opening_files_in_directory_order_fetches_the_next_ones(home: Home) -> None:
    dag = Dag()
    entries = {b"%03d" % n: (dag.block(b"file %d" % n, cids.RAW), 8) for n in range(100)}
    root = dag.directory(entries)
    opened = [cids.text(cid) for cid, _size in list(entries.values())[:3]]
    with mounted(home, dag) as (gateway, mount):
        folder = mount.path / cids.text(root)
        os.listdir(folder)
        for name in ("000", "050", "099", "020"):
            (folder / name).read_bytes()
        assert len(gateway.asked) == 5, "picking single files fetches only these"
        for name in ("000", "001", "002"):
            (folder / name).read_bytes()
        ahead = {cids.text(cid) for cid, _size in list(entries.values())[3:60]}
        wait_until(lambda: ahead <= set(gateway.asked), "the next files were fetched")
        assert set(opened) <= set(gateway.asked)
        assert max(gateway.asked[name] for name in {*opened, *ahead}) == 1
