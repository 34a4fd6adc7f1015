"""A Kubo repository is read in place, without the node, if its layout is known. If not, the node is asked."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import BlockTooLarge, SourceFailed, WrongBlock
from ipfsfuse.fileio.flatfs import LENT, BlockFiles, Read
from ipfsfuse.sources.base import LeafRange, Subtree
from ipfsfuse.sources.http import kubo
from ipfsfuse.sources.http.client import HttpSettings
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.local import kubo_repo
from ipfsfuse.sources.local.kubo_repo import Flatfs
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.spec import OpenSettings, open_source, parse_sources
from ipfsfuse.sources.streams import Delivery, Hashed, Send
from ipfsfuse.structures import Buffer
from tests.kubo.node import Node
from tests.mounting import NOBODY, Home, command_of, wait_until
from tests.sources.content import SampleFile, encode_car, raw_blocks, sample, trees
from tests.sources.streamed import give_each

FILE = sample(31, count=9)
MOUNT = {
    "mountpoint": "/blocks",
    "path": "blocks",
    "shardFunc": "/repo/flatfs/shard/v1/next-to-last/2",
    "type": "flatfs",
}


def make_repository(folder: Path, spec: object = None, sharding: str = MOUNT["shardFunc"]) -> Path:
    """Makes a repository with the settings of its datastore, and no blocks."""
    (folder / "blocks").mkdir(parents=True)
    (folder / "blocks" / "SHARDING").write_text(sharding + "\n")
    (folder / "datastore_spec").write_text(
        json.dumps(spec or {"mounts": [MOUNT, {"mountpoint": "/", "type": "levelds"}], "type": "mount"})
    )
    return folder


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_a_block_is_found_by_its_multihash_whatever_its_codec(tmp_path: Path) -> None:
    """The file has the name that Kubo gives to the block of the empty directory, which every node has."""
    repository = make_repository(tmp_path / "repo")
    empty = cids.parse("bafybeiczsscdsbs7ffqz55asqdf3smv6klcw3gofszvwlyarci47bgf354")
    path = repository / "blocks" / "X3" / "CIQFTFEEHEDF6KLBT32BFAGLXEZL4UWFNWM4LFTLMXQBCERZ6CMLX3Y.data"
    path.parent.mkdir()
    path.write_bytes(b"\x0a\x02\x08\x01")
    blocks = kubo_repo.open_flatfs(repository)
    assert blocks is not None
    for spelled in (
        empty,
        cids.parse("QmUNLLsPACCz1vLxQVkXqqLX5R1X345qqfHbsf67hvA3Nn"),
        Cid(b"\x01\x55" + cids.multihash(empty)),
    ):
        assert blocks.read(spelled) == b"\x0a\x02\x08\x01"
        assert blocks.have([spelled])
    assert blocks.read(next(iter(raw_blocks(97, 1)))) is None


@pytest.mark.parametrize(
    ("spec", "sharding"),
    [
        ({"type": "badgerds", "path": "badgerds"}, MOUNT["shardFunc"]),
        ({"mounts": [MOUNT | {"type": "pebbleds"}], "type": "mount"}, MOUNT["shardFunc"]),
        (
            {"mounts": [MOUNT | {"shardFunc": "/repo/flatfs/shard/v1/prefix/2"}], "type": "mount"},
            "/repo/flatfs/shard/v1/prefix/2",
        ),
        ({"mounts": [MOUNT], "type": "mount"}, "/repo/flatfs/shard/v1/next-to-last/3"),
        ({"type": "mount"}, MOUNT["shardFunc"]),
        ({"mounts": [None, 5, {}], "type": "mount"}, MOUNT["shardFunc"]),
    ],
)
def test_a_repository_with_another_layout_is_left_to_the_node(
    tmp_path: Path, spec: object, sharding: str
) -> None:
    assert kubo_repo.open_flatfs(make_repository(tmp_path / "repo", spec, sharding)) is None


def test_a_missing_repository_is_not_opened(tmp_path: Path) -> None:
    assert kubo_repo.open_flatfs(tmp_path / "none") is None


@pytest.mark.logs("is left alone")
@pytest.mark.parametrize(
    "spec",
    [
        *(
            "{",
            "[1]",
            '"x"',
            "null",
            '{"mounts": null}',
            '{"mounts": "x"}',
            '{"mounts": {"a": 1}}',
            "[" * 100_000,
            "\xff",
            "",
        ),
        json.dumps({"mounts": [MOUNT | {"path": "a\0b"}]}),
        json.dumps({"mounts": [MOUNT | {"shardFunc": kubo_repo.SHARDING + "9" * 5000}]}),
    ],
)
def test_a_repository_with_a_broken_configuration_is_left_alone_and_named(
    tmp_path: Path, spec: str, caplog: pytest.LogCaptureFixture
) -> None:
    repository = make_repository(tmp_path / "repo")
    (repository / "datastore_spec").write_text(spec, encoding="latin-1")
    assert kubo_repo.open_flatfs(repository) is None
    (record,) = caplog.records
    assert str(repository) in record.getMessage()


@pytest.mark.logs("content is blocked")
def test_a_denylist_that_is_added_later_is_noticed(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repo")
    blocks = kubo_repo.open_flatfs(repository)
    assert blocks is not None
    (cid, block), *_ = raw_blocks(96, 1).items()
    leaf = Leaf(cid, 0, len(block))
    path = Path(blocks._path(cid))
    path.parent.mkdir()
    path.write_bytes(block)
    assert (
        blocks.read(cid),
        blocks.read_some([cid]),
        bytes(blocks.read_each([leaf])[0]),
        blocks.have([cid]),
    ) == (block, [Hashed(block, hashlib.sha256(block).digest())], block, True)
    (repository / "denylists").mkdir()
    (repository / "denylists" / "mine.deny").touch()
    wait_until(lambda: blocks.read(cid) is None, "the list is seen", 5)
    assert (blocks.read_some([cid]), blocks.read_each([leaf]), blocks.have([cid])) == ([None], [], False)
    (repository / "denylists" / "mine.deny").unlink()
    wait_until(lambda: blocks.read(cid) == block, "its removal is seen", 5)


@pytest.mark.logs("content is blocked")
def test_denylists_of_the_repositorys_owner_count_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the place of the owner's home is faked, because a test can't change it."""
    repository = make_repository(tmp_path / "repo")
    home = tmp_path / "home of ipfs"
    monkeypatch.setattr(kubo_repo.pwd, "getpwuid", lambda _user: SimpleNamespace(pw_dir=str(home)))
    assert kubo_repo.open_flatfs(repository) is not None
    (home / ".config" / "ipfs" / "denylists").mkdir(parents=True)
    (home / ".config" / "ipfs" / "denylists" / "mine.deny").touch()
    assert kubo_repo.open_flatfs(repository) is None


@pytest.mark.logs("content is blocked")
@pytest.mark.parametrize("where", ["repo/denylists", "config/ipfs/denylists"])
def test_a_repository_with_a_denylist_is_left_to_the_node(tmp_path: Path, where: str) -> None:
    repository = make_repository(tmp_path / "repo")
    folder = tmp_path / where
    folder.mkdir(parents=True)
    (folder / "README").touch()
    assert kubo_repo.open_flatfs(repository) is not None
    (folder / "mine.deny").touch()
    assert kubo_repo.open_flatfs(repository) is None


def test_a_file_that_is_not_a_block_or_cannot_be_read_is_left_to_the_node(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repo")
    (cid,) = raw_blocks(96, 1)
    leaf = Leaf(cid, 0, len(raw_blocks(96, 1)[cid]))
    blocks = Flatfs(repository / "blocks", 2)
    path = Path(blocks._path(cid))
    path.parent.mkdir()
    path.symlink_to("/etc/hostname")
    assert blocks.read(cid) is None
    path.unlink()
    path.mkdir()
    assert blocks.read(cid) is None
    path.rmdir()
    os.mkfifo(path)
    assert blocks.read(cid) is None
    assert blocks.read_each([leaf]) == []
    path.unlink()
    with path.open("wb") as file:
        file.truncate(cids.MAX_BLOCK + 1)
    with pytest.raises(BlockTooLarge, match="as a block of 2,097,153 bytes"):
        blocks.read(cid)
    assert blocks.read_some([cid]) == [None]
    assert blocks.read_each([leaf]) == []
    path.write_bytes(b"")
    assert blocks.read(cid) == b""


def put(node: Node, file: SampleFile) -> Flatfs:
    node.cmd("dag", "import", "--pin-roots=false", stdin=file.car())
    blocks = kubo_repo.open_flatfs(node.repo)
    assert blocks is not None
    return blocks


async def streamed(source: Kubo, file: SampleFile) -> dict[int, bytes]:
    got: dict[int, bytes] = {}

    async def deliver(index: int, blocks: Sequence[Buffer]) -> None:
        assert not got.keys() & set(range(index, index + len(blocks))), "a leaf came twice"
        got.update((index + at, bytes(block)) for at, block in enumerate(blocks))

    await give_each(source.stream(file.run), deliver)
    return got


def test_blocks_of_the_repository_are_read_while_the_node_is_paused(
    own_node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPFS_PATH", str(own_node.repo))
    blocks = put(own_node, FILE)

    async def main() -> None:
        source = Kubo("kubo", HttpSettings(), blocks=blocks)
        with trio.fail_after(20):
            assert {cid: await source.get(cid) for cid in FILE.blocks} == FILE.blocks
            assert await streamed(source, FILE) == FILE.expected
        await source.aclose()

    own_node.pause()
    try:
        trio.run(main)
    finally:
        own_node.resume()


def test_the_node_finds_blocks_that_the_repository_lacks(
    two_nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = two_nodes
    monkeypatch.setenv("IPFS_PATH", str(near.repo))
    put(far, FILE)
    blocks = kubo_repo.open_flatfs(near.repo)
    assert blocks is not None

    async def main() -> None:
        source = Kubo("kubo", HttpSettings(), blocks=blocks)
        with trio.fail_after(60):
            assert await streamed(source, FILE) == FILE.expected, "from the other node, through this one"
            assert await source.get(FILE.root) == FILE.blocks[FILE.root]
        assert blocks.have([leaf.cid for leaf in FILE.run.leaves]), "now this repository has them"
        await source.aclose()

    trio.run(main)


def test_leaves_are_read_in_the_repository_up_to_the_first_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No node runs. A block with another size than its leaf is left out."""
    repository = make_repository(tmp_path / "repo")
    monkeypatch.setenv("IPFS_PATH", str(repository))
    blocks = kubo_repo.open_flatfs(repository)
    assert blocks is not None
    file = sample(69, 40)
    for number, leaf in enumerate(file.leaves):
        if number != 25:
            path = Path(blocks._path(leaf.cid))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(file.blocks[leaf.cid] + b"more" * (number == 9))
    got: dict[int, bytes] = {}

    async def deliver(index: int, some: Sequence[Buffer]) -> None:
        got.update((index + at, bytes(block)) for at, block in enumerate(some))

    async def main() -> None:
        source = Kubo("kubo", HttpSettings(), blocks=blocks)
        with pytest.raises(SourceFailed, match="no Kubo node runs"):
            await give_each(source.stream(file.run), deliver)

    trio.run(main)
    # leaves 9 to 14 are the rest of a segment, which one call reads
    assert set(range(26)) - got.keys() == {*range(9, 15), 25}


@pytest.mark.parametrize("lacks", [1, 6, 39])
def test_the_node_sends_the_leaves_from_the_first_that_the_repository_lacks(
    two_nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch, lacks: int
) -> None:
    near, far = two_nodes
    monkeypatch.setenv("IPFS_PATH", str(near.repo))
    file = sample(70 + lacks, 40)
    put(far, file)
    kept = [leaf.cid for leaf in file.leaves if leaf != file.leaves[lacks]]
    car = encode_car(kept[0], [(cid, file.blocks[cid]) for cid in kept])
    near.cmd("dag", "import", "--pin-roots=false", stdin=car)
    blocks = kubo_repo.open_flatfs(near.repo)
    assert blocks is not None
    asked: list[Sequence[Leaf]] = []

    class Asked(Gateway):
        async def send_leaves(self, wanted: LeafRange, send: Send[Delivery]) -> None:
            asked.append(wanted.leaves)
            await super().send_leaves(wanted, send)

    monkeypatch.setattr(kubo, "Gateway", Asked)

    async def main() -> None:
        source = Kubo("kubo", HttpSettings(), blocks=blocks)
        with trio.fail_after(60):
            assert await streamed(source, file) == file.expected, "the rest comes from the other node"
        await source.aclose()

    trio.run(main)
    assert asked == [file.run.leaves[lacks:]]


def test_the_node_sends_a_directory_if_the_repository_lacks_a_block_of_it(
    two_nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = two_nodes
    monkeypatch.setenv("IPFS_PATH", str(near.repo))
    tree = trees()["nested"]
    *_others, missing = (cid for cid in tree.blocks if cids.inline_or_empty_block(cid) is None)
    far.cmd("dag", "import", "--pin-roots=false", stdin=tree.car())
    near.cmd(
        "dag",
        "import",
        "--pin-roots=false",
        stdin=encode_car(tree.root, [item for item in tree.blocks.items() if item[0] != missing]),
    )
    blocks = kubo_repo.open_flatfs(near.repo)
    assert blocks is not None
    got: dict[Cid, bytes] = {}

    async def deliver(some: Sequence[tuple[Cid, bytes]]) -> None:
        got.update(some)

    async def main() -> None:
        source = Kubo("kubo", HttpSettings(), blocks=blocks)
        with trio.fail_after(60):
            await give_each(source.subtree(Subtree(tree.root, True, 1 << 30)), deliver)
        await source.aclose()

    assert not blocks.have([missing])
    trio.run(main)
    assert got == tree.blocks


@pytest.mark.logs("wrong")
def test_a_collected_block_is_left_out_and_a_damaged_one_is_refused(
    own_node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPFS_PATH", str(own_node.repo))
    blocks = put(own_node, FILE)
    damaged = FILE.run.leaves[5].cid
    os.unlink(blocks._path(FILE.run.leaves[2].cid))
    Path(blocks._path(damaged)).write_bytes(b"?" * FILE.run.leaves[5].size)

    async def main() -> None:
        source = Kubo("kubo", HttpSettings(), blocks=blocks, offline=True)
        monkeypatch.setattr(blocks, "have", lambda _wanted: True)  # as if it was there a moment ago
        assert 2 not in await streamed(source, FILE), "it is left out, and the pool asks for it by itself"
        pool = SourcePool([source])
        with pytest.raises(WrongBlock):
            await pool.get(damaged)
        assert (await pool.get(FILE.root)).block == FILE.blocks[FILE.root]
        await pool.aclose()

    trio.run(main)


def test_the_source_kubo_needs_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = make_repository(tmp_path / "repo")
    ((cid, block),) = raw_blocks(96, 1).items()
    path = Path(Flatfs(repository / "blocks", 2)._path(cid))
    path.parent.mkdir()
    path.write_bytes(block)
    monkeypatch.setenv("IPFS_PATH", str(repository))
    settings = OpenSettings(tmp_path / "library", tmp_path / "indexes", HttpSettings(), False)
    own, named = (
        open_source(spec, settings) for spec in parse_sources(["kubo", "kubo+http://127.0.0.1:5001"])
    )
    assert isinstance(own, Kubo)
    assert trio.run(own.get, cid) == block, "no node runs, so it is read in the repository"
    assert isinstance(named, Kubo)
    assert named.blocks is None, "the node at this address may have another repository"
    monkeypatch.setenv("IPFS_PATH", str(tmp_path / "none"))
    (other,) = parse_sources(["kubo"])
    with pytest.raises(
        SourceFailed, match=r"no repository of a Kubo node at .*/none: set IPFS_PATH .* kubo\+http://"
    ):
        open_source(other, settings)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "api").write_text("/ip4/127.0.0.1/tcp/5001")
    running = open_source(other, settings)
    assert isinstance(running, Kubo)
    assert running.blocks is None


@pytest.mark.fuse
def test_a_mount_reads_and_stages_from_the_repository_while_the_node_is_paused(
    own_node: Node, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    home.env |= {"IPFS_PATH": str(own_node.repo)}
    content = os.urandom(3_000_000)
    cid = own_node.cmd("add", "-Q", "--cid-version=1", "--raw-leaves", stdin=content)
    with home.mounted("--from", "kubo", "--pins", "none") as mount:
        own_node.pause()
        try:
            assert (mount.path / cid).read_bytes() == content
            assert os.getxattr(mount.path / cid, "ipfsfuse.source") == b"kubo"
            wait_until(
                lambda: int(os.getxattr(mount.path / cid, "ipfsfuse.staged")) >= len(content), "it is staged"
            )
        finally:
            own_node.resume()


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None,
    reason="needs root and setpriv, to become a user who may read all files",
)
def test_a_user_who_may_read_all_files_may_read_a_repository_of_others(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repo")
    repository.chmod(0o700)
    look = (
        "import sys, pathlib; from ipfsfuse.sources.local import kubo_repo; "
        "sys.exit(kubo_repo.open_flatfs(pathlib.Path(sys.argv[1])) is None)"
    )
    assert (
        subprocess.run(
            [*command_of(NOBODY), sys.executable, "-c", look, str(repository)], check=False
        ).returncode
        == 0
    )


@pytest.mark.logs("wrong bytes")
@pytest.mark.parametrize("size", [100, 300_000, cids.MAX_BLOCK])
def test_a_block_that_is_hashed_while_it_is_read_is_refused_if_a_bit_is_wrong(
    tmp_path: Path, size: int
) -> None:
    """The bit may be anywhere in the block: the file is read and hashed piece by piece."""
    right = os.urandom(size)
    cid = cids.make(cids.RAW, b"\x12\x20" + hashlib.sha256(right).digest())
    blocks = Flatfs(tmp_path, 2)
    path = Path(blocks._path(cid))
    path.parent.mkdir()

    path.write_bytes(right)

    async def main() -> None:
        pool = SourcePool([Kubo("kubo", HttpSettings(), blocks=blocks)])
        assert (await pool.get(cid)).block == right
        for at in (0, size // 2, size - 1):
            wrong = bytearray(right)
            wrong[at] ^= 1
            await trio.Path(path).write_bytes(bytes(wrong))
            with pytest.raises(WrongBlock):
                await pool.get(cid)
        await pool.aclose()

    trio.run(main)


def test_large_blocks_that_are_read_at_the_same_time_do_not_share_memory(tmp_path: Path) -> None:
    """There is memory for one large block, which is used again. What was returned stays as it is."""
    files, folder, dice = BlockFiles(str(tmp_path), 2), Flatfs(tmp_path, 2), random.Random(8)
    wanted: dict[bytes, bytes] = {}
    for size in (128 << 10, (128 << 10) + 1, LENT - 1, LENT, 700_001, 1 << 20, 2 << 20):
        block = dice.randbytes(size)
        multihash = multihashes.SHA2_256_PREFIX + hashlib.sha256(block).digest()
        path = Path(folder._path(cids.make(cids.RAW, multihash)))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(block)
        wanted[multihash[2:]] = block

    def read(digest: bytes) -> tuple[bytes, Read | int]:
        return digest, files.read(digest, cids.RAW)

    with ThreadPoolExecutor(4) as readers:
        got = list(readers.map(read, dice.choices(list(wanted), k=200)))
    for digest, each in got:
        assert isinstance(each, Read)
        assert each.block == wanted[digest]
        assert each.digest == digest


@pytest.mark.parametrize("most", [4_096, 20_000, 1 << 20])
def test_many_blocks_come_in_order_by_calls_that_read_a_limited_number_of_bytes(
    tmp_path: Path, most: int
) -> None:
    dice = random.Random(most)
    files, folder = BlockFiles(str(tmp_path), 2), Flatfs(tmp_path, 2)
    wanted: dict[bytes, bytes] = {}
    for number in range(100):
        block = dice.randbytes(dice.choice([0, 1, dice.randrange(4_096), most])) + b"%d" % number
        path = Path(
            folder._path(cids.make(cids.RAW, multihashes.SHA2_256_PREFIX + hashlib.sha256(block).digest()))
        )
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(block)
        wanted[hashlib.sha256(block).digest()] = block
    digests, got = list(wanted), list[Read | int]()
    while len(got) < len(digests):
        some = files.read_many(digests[len(got) : len(got) + 32], most)
        assert some, "each call reads at least the first block"
        assert sum(len(read.block) for read in some[1:] if isinstance(read, Read)) <= most
        got += some
    assert got == [Read(block, digest) for digest, block in wanted.items()]


def test_read_some_leaves_out_large_blocks_and_files_that_are_not_regular(tmp_path: Path) -> None:
    folder = Flatfs(tmp_path, 2)
    blocks = [b"absent", b"file", b"link", b"folder", b"pipe", b"large", b"last"]
    some = [
        cids.make(cids.RAW, multihashes.SHA2_256_PREFIX + hashlib.sha256(block).digest()) for block in blocks
    ]
    for cid, block in zip(some[1:], blocks[1:], strict=True):
        path = Path(folder._path(cid))
        path.parent.mkdir(exist_ok=True)
        match block:
            case b"link":
                path.symlink_to(folder._path(some[1]))
            case b"folder":
                path.mkdir()
            case b"pipe":
                os.mkfifo(path)
            case b"large":
                with path.open("wb") as file:
                    file.truncate(cids.MAX_BLOCK + 1)
            case _:
                path.write_bytes(block)
    found = folder.read_some(some)
    assert [read.block if isinstance(read, Hashed) else read for read in found] == [
        block if block in (b"file", b"last") else None for block in blocks
    ]
