"""Many blocks in one answer: from servers that can't send that, lack a block or break off. And the bytes that
are counted while they are on their way."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.sources.base import LeafRange, Subtree
from ipfsfuse.sources.http import client, gateway
from ipfsfuse.sources.http.client import Http, HttpSettings
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.structures import Buffer
from tests.kubo.node import free_port
from tests.sources.content import sample, trees
from tests.sources.servers import Ask, Behaviour, Server, answer_well
from tests.sources.streamed import give_each
from tests.sources.timed import Takes

FILE, OTHER = sample(31), sample(32)
TREE = trees()["nested"]
SUBTREE = Subtree(TREE.root, True, 1 << 20)


@pytest.fixture(autouse=True, params=["own", "httpx"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for our own transport and for httpx's."""
    monkeypatch.setattr(client, "OWN_TRANSPORT", request.param == "own")


def with_gateway(
    server: Server,
    main: Callable[[Gateway], Awaitable[None]],
    *,
    local: bool = False,
    settings: HttpSettings | None = None,
) -> None:
    async def opened() -> None:
        gateway = Gateway(Http(parse_origin(server.url), settings), server.url, local=local)
        try:
            await main(gateway)
        finally:
            await gateway.aclose()

    trio.run(opened)


async def directory_of(gateway: Gateway, subtree: Subtree = SUBTREE) -> dict[Cid, bytes]:
    got: dict[Cid, bytes] = {}

    async def deliver(blocks: Sequence[tuple[Cid, bytes]]) -> None:
        got.update(blocks)

    await give_each(gateway.subtree(subtree), deliver)
    return got


async def streamed(gateway: Gateway, of: LeafRange = FILE.run) -> dict[int, Buffer]:
    got: dict[int, Buffer] = {}

    async def deliver(index: int, blocks: Sequence[Buffer]) -> None:
        got.update(enumerate(blocks, index))

    await give_each(gateway.stream(of), deliver)
    return got


def instead_of_cars(status: int, type_: str = "text/plain") -> Behaviour:
    def behave(ask: Ask) -> None:
        if ask.query.get("format") == "car":
            ask.send(status, b"<!doctype html>", type_)
        else:
            answer_well(ask)

    return behave


def test_a_long_page_instead_of_blocks_is_a_failure() -> None:
    """Only a CAR may be longer than what was asked for."""

    def behave(ask: Ask) -> None:
        ask.send(500, b"<!doctype html>" + bytes(client.ERROR_BODY), "text/html")

    async def main(gateway: Gateway) -> None:
        with pytest.raises(SourceFailed):
            await directory_of(gateway)

    with Server({}, behave, files=(FILE,), trees=(TREE,)) as server:
        with_gateway(server, main)


def cars_asked(server: Server) -> int:
    return sum(ask.query.get("format") == "car" for ask in server.asked)


@pytest.mark.parametrize(
    ("status", "type_"),
    [
        (200, "text/html"),
        (200, "application/vnd.ipld.raw"),
        *((status, "text/plain") for status in (400, 405, 406, 415, 501)),
    ],
)
def test_a_gateway_without_cars_is_asked_for_a_car_only_once(status: int, type_: str) -> None:
    with Server({}, instead_of_cars(status, type_), files=(FILE,), trees=(TREE,)) as server:

        async def main(gateway: Gateway) -> None:
            assert await directory_of(gateway) == {}
            assert await streamed(gateway) == FILE.expected
            assert await directory_of(gateway) == {}

        with_gateway(server, main)
        assert cars_asked(server) == 1


@pytest.mark.parametrize(
    ("status", "error"), [(404, NotHere), (504, NotHere), (500, SourceFailed), (503, SourceFailed)]
)
def test_cars_are_still_asked_for_after_other_failures(status: int, error: type[Exception]) -> None:
    refused = instead_of_cars(status)

    def behave(ask: Ask) -> None:
        (refused if len(ask.server.asked) <= 2 else answer_well)(ask)

    with Server({}, behave, files=(FILE,), trees=(TREE,)) as server:

        async def main(gateway: Gateway) -> None:
            with pytest.raises(error):
                await directory_of(gateway)
            with pytest.raises(error):
                await streamed(gateway)
            assert await directory_of(gateway) == TREE.blocks
            assert await streamed(gateway) == FILE.expected

        with_gateway(server, main)
        assert cars_asked(server) == 4


@pytest.mark.parametrize(("status", "error"), [(404, NotHere), (504, NotHere), (500, SourceFailed)])
def test_ranges_are_still_asked_for_after_one_file_has_failed(status: int, error: type[Exception]) -> None:
    def behave(ask: Ask) -> None:
        if ask.cid == OTHER.root:
            ask.send(status, b"no", "text/plain")
        else:
            answer_well(ask)

    with Server({}, behave, files=(FILE, OTHER)) as server:

        async def main(gateway: Gateway) -> None:
            with pytest.raises(error):
                await streamed(gateway, OTHER.run)
            assert await streamed(gateway) == FILE.expected

        with_gateway(server, main, local=True)
        assert len(server.asked) == 2


def test_ranges_are_still_asked_for_after_leaves_that_claim_no_bytes() -> None:
    hollow = LeafRange(OTHER.root, 0, [Leaf(leaf.cid, 0, 0) for leaf in OTHER.leaves])
    with Server({}, files=(FILE, OTHER)) as server:

        async def main(gateway: Gateway) -> None:
            assert await streamed(gateway, hollow) == OTHER.expected
            assert all("range" not in ask.headers for ask in server.asked), "an empty range is not asked for"
            before = len(server.asked)
            assert await streamed(gateway) == FILE.expected
            assert len(server.asked) == before + 1

        with_gateway(server, main, local=True)


@pytest.mark.parametrize("gateway", ["off", "guarded"])
def test_a_node_without_a_usable_gateway_port_sends_no_directory_and_does_not_fail(
    gateway: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guarded(ask: Ask) -> None:
        if ask.method == "POST":
            answer_well(ask)
        else:
            ask.send(403, b"", "text/plain")

    monkeypatch.setenv("IPFS_PATH", str(tmp_path))
    with Server({}, guarded, trees=(TREE,)) as server:
        (tmp_path / "api").write_text(f"/ip4/127.0.0.1/tcp/{server.port}")
        (tmp_path / "gateway").write_text(
            server.url if gateway == "guarded" else f"http://127.0.0.1:{free_port()}"
        )

        async def main() -> None:
            pool = SourcePool([Kubo("kubo", HttpSettings())])

            takes = Takes()
            try:
                for _ in range(4):
                    await give_each(pool.subtree(SUBTREE, takes), takes.take)
                assert takes.got == {}
                assert (await pool.get(TREE.root)).block == TREE.blocks[TREE.root]
                assert (pool.statistics()[0].failures, pool.statistics()[0].state) == ({}, "good")
            finally:
                await pool.aclose()

        trio.run(main)


@pytest.mark.parametrize("ended", [True, False])
def test_the_blocks_before_the_end_of_a_truncated_car_are_used(ended: bool) -> None:
    cut = TREE.car()[:-10]

    def behave(ask: Ask) -> None:
        ask.send_chunked([cut[:3000], cut[3000:]], end=ended)

    with Server({}, behave, trees=(TREE,)) as server:

        async def main(gateway: Gateway) -> None:
            got: dict[Cid, bytes] = {}

            async def deliver(blocks: Sequence[tuple[Cid, bytes]]) -> None:
                got.update(blocks)

            if ended:
                await give_each(gateway.subtree(SUBTREE), deliver)
            else:
                with pytest.raises(SourceFailed) as caught:
                    await give_each(gateway.subtree(SUBTREE), deliver)
                assert caught.value.kind == "short"
            assert list(got.items()) == list(TREE.blocks.items())[:-1]

        with_gateway(server, main)


def test_received_bytes_are_counted_until_they_are_released_or_the_stream_is_left() -> None:
    settings = HttpSettings()
    with Server({}, files=(FILE,)) as server:

        async def main(gateway: Gateway) -> None:
            # the next batch, after one leaf and two
            meanwhile = sum(leaf.size for leaf in FILE.run.leaves[3:7])
            for _ in range(3):
                async with gateway.stream(FILE.run) as stream:
                    first, second = await anext(stream), await anext(stream)
                    held = [sum(map(len, each.blocks)) for each in (first, second)]
                    await wait_all_tasks_blocked(0.05)
                    assert settings.budget.used == sum(held) + meanwhile, (
                        "the bytes read meanwhile are counted too"
                    )
                    first.release()
                    assert settings.budget.used == held[1] + meanwhile
                assert settings.budget.used == 0
            assert await streamed(gateway) == FILE.expected
            assert settings.budget.used == 0

        with_gateway(server, main, local=True, settings=settings)


def test_a_delivery_that_fails_ends_the_stream_and_its_bytes_are_no_longer_counted() -> None:
    settings = HttpSettings()
    with Server({}, files=(FILE,)) as server:

        async def main(gateway: Gateway) -> None:
            async def deliver(index: int, blocks: Sequence[Buffer]) -> None:
                if index == 1:
                    raise SourceFailed("no room", "reader")

            with pytest.raises(SourceFailed, match="no room"):
                await give_each(gateway.stream(FILE.run), deliver)
            assert settings.budget.used == 0

        with_gateway(server, main, local=True, settings=settings)


def test_a_car_of_tiny_sections_is_parsed_in_small_parts() -> None:
    """A piece of 256 KiB holds 40,000 sections, which take 200 ms to parse."""
    section = car.section_head(cids.make(cids.RAW, b"\0\0"), 0)
    stream = car.encode_header([]) + section * 40_000
    assert len(stream) < 256 << 10

    def deliveries(body: bytes, most: list[int]) -> None:
        def behave(ask: Ask) -> None:
            ask.send(200, body, "application/vnd.ipld.car")

        async def main(gateway: Gateway) -> None:
            async def deliver(blocks: Sequence[tuple[Cid, bytes]]) -> None:
                most.append(len(blocks))

            await give_each(gateway.subtree(SUBTREE), deliver)

        with Server({}, behave) as server:
            with_gateway(server, main)

    counts: list[int] = []
    deliveries(stream, counts)
    assert sum(counts) == 40_000
    assert max(counts) <= gateway.SECTIONS
    with pytest.raises(SourceFailed, match="broken CAR"):
        deliveries(stream + b"\1\1", counts)


def test_an_answer_that_is_not_ready_is_a_failure_and_is_asked_for_again() -> None:
    def behave(ask: Ask) -> None:
        if len(server.asked) == 1:
            ask.connection.sendall(b"HTTP/1.1 202 Accepted\r\nContent-Length: 5\r\n\r\nlater")
        else:
            answer_well(ask)

    async def main(gateway: Gateway) -> None:
        with pytest.raises(SourceFailed, match="202"):
            await directory_of(gateway)
        assert await directory_of(gateway) == TREE.blocks

    with Server(TREE.blocks, behave, trees=(TREE,)) as server:
        with_gateway(server, main)
