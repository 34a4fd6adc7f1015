"""Two real nodes, connected over loopback. The first is asked for content that only the other one has."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import Unavailable
from ipfsfuse.sources.http.client import HttpSettings
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.pool.pool import SourcePool
from tests.kubo.node import Node

PATIENCE = 60.0
"""Seconds. The calls take milliseconds on a machine that is not busy."""


@asynccontextmanager
async def pool_of_node(node: Node, *, offline: bool = False) -> AsyncIterator[SourcePool]:
    """A pool of one source: this node."""
    pool = SourcePool(
        [Kubo("kubo", HttpSettings(), parse_origin(node.api_url), offline=offline)], offline=offline
    )
    try:
        yield pool
    finally:
        with trio.CancelScope(shield=True):
            await pool.aclose()


def add(node: Node, data: bytes) -> Cid:
    return cids.parse(node.add(data, "--cid-version=1"))


def test_blocks_that_only_the_other_node_has_come_through_the_first(two_nodes: tuple[Node, Node]) -> None:
    near, far = two_nodes
    contents = {add(far, data): data for data in (os.urandom(1 << 18) for _ in range(5))}

    async def main() -> None:
        async with pool_of_node(near) as pool:
            for cid, data in contents.items():
                assert not near.has(cids.text(cid))
                with trio.fail_after(PATIENCE):
                    assert (await pool.get(cid)).block == data
                assert near.has(cids.text(cid))

    trio.run(main)


def test_an_offline_source_never_makes_the_node_ask_its_network(two_nodes: tuple[Node, Node]) -> None:
    near, far = two_nodes
    cid, here = add(far, b"elsewhere"), add(near, b"here")

    async def main() -> None:
        async with pool_of_node(near, offline=True) as pool:
            with trio.fail_after(PATIENCE):
                assert (await pool.get(here)).block == b"here"
                with pytest.raises(Unavailable):
                    await pool.get(cid)

    trio.run(main)
    assert not near.has(cids.text(cid))


def test_reads_go_on_after_the_other_node_was_killed_and_started_again(two_nodes: tuple[Node, Node]) -> None:
    near, far = two_nodes
    contents = {add(far, data): data for data in (os.urandom(1 << 16) for _ in range(4))}
    before, during, *after = contents

    async def main() -> None:
        async with pool_of_node(near) as pool:
            with trio.fail_after(PATIENCE):
                assert (await pool.get(before)).block == contents[before]
            far.kill()
            with trio.move_on_after(1) as deadline:  # the caller's deadline, as the cache sets it
                await pool.get(during)
            assert deadline.cancelled_caught
            await trio.to_thread.run_sync(far.start)
            near.connect(far)
            for cid in (during, *after):
                with trio.fail_after(PATIENCE):
                    assert (await pool.get(cid)).block == contents[cid]

    trio.run(main)


def test_reads_go_on_after_a_restart_of_the_first_node(two_nodes: tuple[Node, Node]) -> None:
    near, far = two_nodes
    one, two = add(near, b"one"), add(far, b"two")

    async def main() -> None:
        async with pool_of_node(near) as pool:
            with trio.fail_after(PATIENCE):
                assert (await pool.get(one)).block == b"one"
                await trio.to_thread.run_sync(near.restart)
                near.connect(far)
                assert (await pool.get(one)).block == b"one"
                assert (await pool.get(two)).block == b"two"

    trio.run(main)
