"""The contract of a source, tested with every kind: the library, a CAR file, gateways, and a Kubo node that
is read in several ways."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere
from ipfsfuse.sources.base import Source, Subtree
from ipfsfuse.sources.http import client
from ipfsfuse.sources.http.client import Http, HttpSettings
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.local import kubo_repo
from ipfsfuse.sources.local.in_place import CarSource, LibrarySource
from ipfsfuse.sources.local.library import Library, NewRoot
from ipfsfuse.structures import Buffer
from tests.kubo.node import Node
from tests.sources.content import SampleFile, encode_car, raw_blocks, sample, trees
from tests.sources.servers import Ask, Server, answer_well
from tests.sources.streamed import give_each

FILES = (
    sample(1),
    sample(2, raw=False),
    sample(3, count=5, size=1 << 20),
    sample(4, repeat=True),
    sample(5, count=14, size=1 << 20),
)
TREES = trees()
ABSENT = next(iter(raw_blocks(99, 1)))
Open = Callable[[], AbstractAsyncContextManager[Source]]


def library_source(folder: Path) -> Source:
    library = Library(folder / "library")
    for each in (*FILES, *TREES.values()):
        with library.open_writer() as writer:
            for cid, block in each.blocks.items():
                writer.put(cid, block)
            writer.commit([NewRoot(each.root, "sample", 1)])
    return LibrarySource(library)


def car_source(folder: Path) -> Source:
    path = folder / "all.car"
    path.write_bytes(
        encode_car(
            FILES[0].root, [pair for each in (*FILES, *TREES.values()) for pair in each.blocks.items()]
        )
    )
    return CarSource.open(path, folder / "indexes")


def trustless_only(ask: Ask) -> None:
    """A gateway that serves blocks and CARs and no files."""
    if "format" in ask.query:
        answer_well(ask)
    else:
        ask.send(406, b"", "text/plain")


def blocks_only(ask: Ask) -> None:
    if ask.query.get("format") == "raw":
        answer_well(ask)
    else:
        ask.send(501, b"", "text/plain")


KINDS = ["library", "car", "gateway", "gateway-near", "gateway-trustless", "gateway-blocks", "gateway-httpx"]
KINDS += ["kubo-gateway", "kubo-rpc", "kubo-repository", "kubo"]
IN_ONE_ANSWER = {"gateway", "gateway-httpx", "gateway-near", "gateway-trustless", "kubo"}
"""The kinds that send a directory in one answer. Sources in place do not. Neither does a node that must not
look on the network."""
READ_IN_PLACE = "kubo-repository"
"""It is offline, so it has read all that it sends in the repository. It sends all blocks below a directory
except the empty one, in its own order. If only the directory's own nodes are wanted, it sends none."""


@pytest.fixture(params=KINDS)
def source(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator["Open"]:
    kind: str = request.param
    stack = ExitStack()
    if kind.startswith("kubo"):
        node: Node = request.getfixturevalue("kubo_node")
        for each in (*FILES, *TREES.values()):
            node.cmd("dag", "import", "--pin-roots=false", stdin=each.car())
        monkeypatch.setenv("IPFS_PATH", str(node.repo))

    def make() -> Source:
        if kind == "library":
            return library_source(tmp_path)
        if kind == "car":
            return car_source(tmp_path)
        if kind == "kubo":
            return Kubo("kubo", HttpSettings())
        if kind == "kubo-gateway":
            return Gateway(Http(parse_origin(node.gateway_url)), "kubo-gateway", only_cached=True)
        if kind == "kubo-repository":
            blocks = kubo_repo.open_flatfs(node.repo)
            assert blocks is not None
            return Kubo("kubo", HttpSettings(), blocks=blocks, offline=True)
        if kind == "kubo-rpc":
            rpc_only = Kubo("kubo", HttpSettings(), parse_origin(node.api_url), offline=True)
            rpc_only._asked_for_gateway = True  # as for a node on another host
            return rpc_only
        monkeypatch.setattr(client, "OWN_TRANSPORT", kind != "gateway-httpx")
        behave = {"gateway-trustless": trustless_only, "gateway-blocks": blocks_only}.get(kind, answer_well)
        server = stack.enter_context(Server({}, behave, files=FILES, trees=tuple(TREES.values())))
        return Gateway(Http(parse_origin(server.url)), server.url, local=kind == "gateway-near")

    @asynccontextmanager
    async def opened() -> AsyncIterator[Source]:
        found = await trio.to_thread.run_sync(make)
        try:
            yield found
        finally:
            await found.aclose()

    with stack:
        yield opened


def test_each_block_comes_unchanged(source: Open) -> None:
    async def main() -> None:
        async with source() as opened:
            for file in FILES[:3]:
                for cid, block in file.blocks.items():
                    assert await opened.get(cid) == block

    trio.run(main)


# a node that may look on the network takes 30 s to answer that it does not have the block
@pytest.mark.parametrize("source", KINDS[:-1], indirect=True)
def test_an_absent_block_is_not_here(source: Open) -> None:
    async def main() -> None:
        async with source() as opened:
            with pytest.raises(NotHere):
                await opened.get(ABSENT)

    trio.run(main)


@pytest.mark.parametrize("file", FILES, ids=["raw", "dag-pb", "large", "repeated", "long"])
def test_a_range_brings_every_leaf_once(source: Open, file: SampleFile) -> None:
    async def main() -> None:
        got: dict[int, Buffer] = {}

        async def deliver(index: int, blocks: Sequence[Buffer]) -> None:
            assert got.keys().isdisjoint(range(index, index + len(blocks)))
            got.update(enumerate(blocks, index))

        async with source() as opened:
            await give_each(opened.stream(file.run), deliver)
        assert got == file.expected

    trio.run(main)


def test_many_requests_at_once_are_answered(source: Open) -> None:
    file = FILES[0]

    async def main() -> None:
        async with source() as opened:
            got: list[bytes] = []

            async def get(cid: Cid) -> None:
                got.append(await opened.get(cid))

            async with trio.open_nursery() as nursery:
                for cid in [*file.blocks] * 10:
                    nursery.start_soon(get, cid)
            assert sorted(got) == sorted([*file.blocks.values()] * 10)

    trio.run(main)


def test_a_cancelled_range_leaves_the_source_usable(source: Open) -> None:
    file = FILES[2]

    async def main() -> None:
        async with source() as opened:
            with trio.CancelScope() as scope:

                async def deliver(_index: int, _blocks: Sequence[Buffer]) -> None:
                    scope.cancel()
                    await trio.sleep_forever()

                await give_each(opened.stream(file.run), deliver)
            assert scope.cancelled_caught
            assert await opened.get(file.root) == file.blocks[file.root]

    trio.run(main)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "entity"])
def test_a_directory_comes_in_one_answer_or_not_at_all(
    source: Open, request: pytest.FixtureRequest, name: str, whole: bool
) -> None:
    tree = TREES[name]
    wanted = tree.blocks if whole else tree.entity

    async def main() -> None:
        got: list[tuple[Cid, bytes]] = []

        async def deliver(blocks: Sequence[tuple[Cid, bytes]]) -> None:
            got.extend(blocks)

        async with source() as opened:
            for _ in range(2):
                await give_each(opened.subtree(Subtree(tree.root, whole, 1 << 30)), deliver)
        kind = request.node.callspec.params["source"]
        given = kind in IN_ONE_ANSWER or (kind == READ_IN_PLACE and whole)
        each = (
            [item for item in wanted.items() if kind != READ_IN_PLACE or item[0] != cids.EMPTY]
            if given
            else []
        )
        order = sorted if kind == READ_IN_PLACE else list
        assert order(got) == order(each * 2)

    trio.run(main)


@pytest.mark.parametrize("source", ["gateway", "kubo"], indirect=True)
def test_an_absent_directory_is_not_here_and_a_directory_ends_at_its_limit(
    source: Open, request: pytest.FixtureRequest
) -> None:
    tree = TREES["hamt"]

    async def main() -> None:
        got: dict[Cid, bytes] = {}

        async def deliver(blocks: Sequence[tuple[Cid, bytes]]) -> None:
            got.update(blocks)

        async with source() as opened:
            # a node would look for it on the network first
            if request.node.callspec.params["source"] == "gateway":
                with pytest.raises(NotHere):
                    await give_each(opened.subtree(Subtree(ABSENT, True, 1 << 20)), deliver)
            await give_each(opened.subtree(Subtree(tree.root, True, 1)), deliver)
            assert len(got) < len(tree.blocks), "at most the blocks that came with the first bytes"
            assert got.items() <= tree.blocks.items()

    trio.run(main)
