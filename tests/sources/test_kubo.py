"""A real Kubo node as a source: found, lost and found again; asked offline; together with a second node."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.dagpb import Link
from ipfsfuse.errors import NotHere, SourceFailed, Unavailable
from ipfsfuse.sources.base import Subtree
from ipfsfuse.sources.http.client import HttpSettings
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.structures import Buffer
from tests.dag.blocks import Blocks
from tests.kubo.node import Node
from tests.sources.content import SampleFile, encode_car, raw_blocks, sample, tree
from tests.sources.servers import Ask, Server
from tests.sources.streamed import give_each
from tests.sources.timed import Takes

ABSENT = next(iter(raw_blocks(98, 1)))


def put(node: Node, file: SampleFile) -> None:
    node.cmd("dag", "import", "--pin-roots=false", stdin=file.car())


@pytest.mark.parametrize("by", ["gateway", "rpc"])
def test_offline_never_makes_the_node_look_on_the_network(
    two_nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Another node has the block and is connected. The block comes from there, but not offline."""
    asked, other = two_nodes
    file = sample(20)
    put(other, file)
    monkeypatch.setenv("IPFS_PATH", str(asked.repo))

    async def main() -> None:
        for offline in (True, False):
            source = Kubo(
                "kubo", HttpSettings(), parse_origin(asked.api_url) if by == "rpc" else None, offline=offline
            )
            source._asked_for_gateway = by == "rpc"
            if offline:
                pool = SourcePool([source], offline=True)
                for cid in file.blocks:
                    with pytest.raises(NotHere):
                        await source.get(cid)
                with pytest.raises(Unavailable), trio.fail_after(10):
                    await pool.get(file.root)
                got = dict[int, Buffer]()

                async def deliver(index: int, blocks: Sequence[Buffer], got: dict[int, Buffer] = got) -> None:
                    got.update(enumerate(blocks, index))

                async def deliver_blocks(blocks: Sequence[tuple[Cid, bytes]]) -> None:
                    raise AssertionError(blocks)

                await give_each(source.stream(file.run), deliver)
                await give_each(source.subtree(Subtree(file.root, True, 1 << 20)), deliver_blocks)
                assert got == {}
                assert not asked.has(cids.text(file.root))
            else:
                assert (await SourcePool([source]).get(file.root)).block == file.blocks[file.root]
            await source.aclose()

    trio.run(main)


def test_a_missing_child_ends_a_directorys_answer_soon_and_is_not_a_failure(
    kubo_node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    heap = Blocks()
    leaves = [heap.leaf(b"of this test alone %d " % number * 100) for number in range(100)]
    sent = tree(heap, heap.directory([Link(cid, b"%d" % number, 1) for number, cid in enumerate(leaves)]))
    kept = [(cid, block) for cid, block in sent.blocks.items() if cid != leaves[60]]
    kubo_node.cmd("dag", "import", "--pin-roots=false", stdin=encode_car(sent.root, kept))
    monkeypatch.setenv("IPFS_PATH", str(kubo_node.repo))

    async def main() -> None:
        pool = SourcePool([Kubo("kubo", HttpSettings())])
        takes = Takes()
        with trio.fail_after(20):  # the node looks for it for 30 s
            await give_each(pool.subtree(Subtree(sent.root, True, 1 << 20), takes), takes.take)
        assert list(takes.blocks.items()) == list(sent.blocks.items())[: len(takes.got)]
        assert 1 < len(takes.got) <= 61
        assert pool.statistics()[0].failures == {}
        await pool.aclose()

    trio.run(main)


def test_content_of_another_node_comes_through_ours_even_after_that_node_was_away(
    two_nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, other = two_nodes
    file, late = sample(21), sample(22)
    put(other, file)
    put(other, late)
    monkeypatch.setenv("IPFS_PATH", str(asked.repo))

    async def main() -> None:
        pool = SourcePool([Kubo("kubo", HttpSettings())])
        for cid, block in file.blocks.items():
            assert (await pool.get(cid)).block == block
        await trio.to_thread.run_sync(other.kill)
        assert (await pool.get(file.root)).block == file.blocks[file.root]
        with trio.move_on_after(1) as scope:
            await pool.get(late.root)
        assert scope.cancelled_caught

        async def comes_back() -> None:
            await trio.to_thread.run_sync(other.start)
            await trio.to_thread.run_sync(asked.connect, other)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(comes_back)
            with trio.fail_after(60):
                assert (await pool.get(late.root)).block == late.blocks[late.root]
        await pool.aclose()

    trio.run(main)


def test_a_node_that_restarts_is_found_again(own_node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sample(23)
    put(own_node, file)
    monkeypatch.setenv("IPFS_PATH", str(own_node.repo))

    async def main() -> None:
        source = Kubo("kubo", HttpSettings())
        pool = SourcePool([source])
        assert (await pool.get(file.root)).block == file.blocks[file.root]
        await trio.to_thread.run_sync(own_node.stop)
        with pytest.raises(SourceFailed) as caught:
            await source.get(file.root)
        assert caught.value.kind == "connect"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, own_node.start)
            with trio.fail_after(60):
                for cid, block in file.blocks.items():
                    assert (await pool.get(cid)).block == block
        assert pool.statistics()[0].failures.keys() == {"connect"}
        await pool.aclose()

    trio.run(main)


def test_without_a_node_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPFS_PATH", str(tmp_path))

    async def main() -> None:
        with pytest.raises(SourceFailed, match="start `ipfs daemon` or set IPFS_PATH"):
            await Kubo("kubo", HttpSettings()).get(ABSENT)

    trio.run(main)


@pytest.mark.parametrize(("token", "right"), [("bearer:right", True), ("bearer:wrong", False)])
def test_the_token_for_a_node_is_read_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, right: bool
) -> None:
    """If the node refuses the token, the message names the file that the token came from."""
    file = sample(24)
    path = tmp_path / "token"
    path.write_text(token)
    path.chmod(0o600)
    monkeypatch.setenv("IPFSFUSE_KUBO_AUTH_FILE", str(path))

    def guarded(ask: Ask) -> None:
        if ask.headers.get("authorization") != "Bearer right":
            ask.send(403, b"Forbidden", "text/plain")
        elif ask.path == "/api/v0/block/get" and ask.method == "POST" and ask.block is not None:
            ask.send(200, ask.block)
        else:
            ask.send(
                500,
                b'{"Message":"block was not found locally (offline): ipld: could not find it","Code":0}',
                "application/json",
            )

    async def main() -> None:
        with Server(file.blocks, guarded) as server:
            source = Kubo("kubo", HttpSettings(), parse_origin(server.url))
            if right:
                assert await source.get(file.root) == file.blocks[file.root]
                with pytest.raises(NotHere):
                    await source.get(ABSENT)
            else:
                with pytest.raises(SourceFailed, match=str(path)) as caught:
                    await source.get(file.root)
                assert caught.value.kind == "refused"
            await source.aclose()

    trio.run(main)


def test_a_stream_that_breaks_off_with_a_trailer_is_an_error() -> None:
    file = sample(25)

    def breaks_off(ask: Ask) -> None:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Stream-Error\r\n\r\n"
        ask.connection.sendall(head + b"3\r\nabc\r\n0\r\nX-Stream-Error: it broke\r\n\r\n")

    async def main() -> None:
        with Server(file.blocks, breaks_off) as server:
            source = Kubo("kubo", HttpSettings(), parse_origin(server.url))
            source._asked_for_gateway = True
            with pytest.raises(SourceFailed, match="it broke") as caught:
                await source.get(file.root)
            assert caught.value.kind == "short"
            await source.aclose()

    trio.run(main)


def test_blocks_come_over_a_unix_socket(tmp_path: Path) -> None:
    """The API of a node may be on a socket file. Here the socket file leads to a server of the tests."""
    file = sample(26)
    path = tmp_path / "api.sock"

    async def main() -> None:
        with Server(file.blocks, lambda ask: ask.send(200, ask.block or b"")) as server:
            listener = trio.socket.socket(trio.socket.AF_UNIX)
            await listener.bind(str(path))
            listener.listen(8)

            async def relay(one: trio.SocketStream, other: trio.SocketStream) -> None:
                async for piece in one:
                    await other.send_all(piece)
                await other.send_eof()

            async with trio.open_nursery() as nursery:

                async def serve(client: trio.SocketStream) -> None:
                    async with (
                        client,
                        await trio.open_tcp_stream("127.0.0.1", server.port) as inner,
                        trio.open_nursery() as both,
                    ):
                        both.start_soon(relay, client, inner)
                        both.start_soon(relay, inner, client)

                nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
                from ipfsfuse.sources.spec import parse_source

                spec = parse_source(f"kubo+unix://{path}")
                source = Kubo(spec.name, HttpSettings(), spec.origin)
                source._asked_for_gateway = True
                for cid, block in file.blocks.items():
                    assert await source.get(cid) == block
                await source.aclose()
                nursery.cancel_scope.cancel()

    trio.run(main)
