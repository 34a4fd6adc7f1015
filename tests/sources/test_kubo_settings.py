"""Kubo nodes with unusual settings: a socket file, a gateway port that serves no files, a gateway port that
refuses."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.base import Source
from ipfsfuse.sources.http.client import HttpSettings
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.http.origin import unix_origin
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.spec import OpenSettings, open_sources
from ipfsfuse.structures import Buffer
from tests.kubo.fixtures import need_kubo
from tests.kubo.node import Node
from tests.sources import evil
from tests.sources.content import SampleFile, sample
from tests.sources.servers import Ask, Behaviour, Server
from tests.sources.streamed import give_each


def put(node: Node, file: SampleFile) -> None:
    node.cmd("dag", "import", "--pin-roots=false", stdin=file.car())


async def check_all_blocks(source: Source, file: SampleFile) -> None:
    """Checks every block of `file` one by one, and its leaves as one range."""
    for cid, block in file.blocks.items():
        assert await source.get(cid) == block
    got: dict[int, Buffer] = {}

    async def deliver(index: int, blocks: Sequence[Buffer]) -> None:
        got.update(enumerate(blocks, index))

    await give_each(source.stream(file.run), deliver)
    assert got == {index: file.blocks[leaf.cid] for index, leaf in enumerate(file.leaves)}


@pytest.mark.parametrize("by", ["gateway", "rpc"])
def test_blocks_come_from_a_node_that_listens_on_a_socket_file(tmp_path: Path, by: str) -> None:
    need_kubo()
    node, path = Node(), tmp_path / "api.sock"
    node.settings = {
        "Addresses": {"API": [f"/ip4/127.0.0.1/tcp/{node.api_url.rpartition(':')[2]}", f"/unix{path}"]}
    }
    file = sample(20)

    async def main() -> None:
        source = Kubo("kubo", HttpSettings(), unix_origin(str(path)))
        source._asked_for_gateway = by == "rpc"
        await check_all_blocks(source, file)
        assert (source._gateway is None) == (by == "rpc")
        await source.aclose()

    with node:
        put(node, file)
        trio.run(main)


def test_no_node_on_another_machine_is_asked_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that the user names nor one that a repository names."""
    monkeypatch.setenv("IPFS_PATH", str(tmp_path))
    for file in ("api", "gateway"):
        (tmp_path / file).write_text("http://192.0.2.1:5001")
    far = ["kubo+http://192.0.2.1:5001", "https://192.0.2.1", "http://192.0.2.1:8080"]

    async def main() -> None:
        settings = OpenSettings(tmp_path / "library", tmp_path / "indexes", offline=True)
        async with open_sources(
            ["library", *far, "kubo+http://127.0.0.1:5001", "http://localhost:8080"], settings
        ) as all_:
            assert [source.name for source in all_] == [
                "library", "kubo+http://127.0.0.1:5001", "http://localhost:8080"
            ]  # fmt: skip
        source = Kubo("kubo", HttpSettings(), offline=True)
        with (
            trio.fail_after(1),
            pytest.raises(SourceFailed, match="is not on this machine: this mount is offline"),
        ):
            await source.get(sample(20).leaves[0].cid)

    trio.run(main)


def test_a_gateway_port_that_serves_only_blocks_and_fetches_nothing_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_kubo()
    file = sample(20)

    async def main() -> None:
        source = Kubo("kubo", HttpSettings())
        await check_all_blocks(source, file)
        await source.aclose()

    with Node(settings={"Gateway": {"NoFetch": True, "DeserializedResponses": False}}) as node:
        put(node, file)
        monkeypatch.setenv("IPFS_PATH", str(node.repo))
        trio.run(main)


def refuses(ask: Ask) -> None:
    ask.send(403, b"not for you\n", "text/plain")


@pytest.mark.parametrize("behave", [refuses, evil.html_page, evil.not_http])
def test_blocks_come_over_rpc_if_the_gateway_port_is_useless(
    own_node: Node, monkeypatch: pytest.MonkeyPatch, behave: Behaviour
) -> None:
    file = sample(20)
    put(own_node, file)
    monkeypatch.setenv("IPFS_PATH", str(own_node.repo))

    async def main() -> None:
        with Server({}, behave) as other:
            (own_node.repo / "gateway").write_text(other.url)
            source = Kubo("kubo", HttpSettings())
            pool = SourcePool([source])
            for cid, block in file.blocks.items():
                assert (await pool.get(cid)).block == block
            assert other.asked
            assert pool.statistics()[0].failures == {}
            await pool.aclose()

    trio.run(main)
