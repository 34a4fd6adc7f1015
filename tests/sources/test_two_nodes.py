"""Two real nodes joined over loopback: content that only the other one has, asked of the first."""

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
"""Seconds for what takes milliseconds, on a busy machine."""


@asynccontextmanager
async def asking(node: Node, *, offline: bool = False) -> AsyncIterator[SourcePool]:
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


def test_what_only_the_other_has_comes_through_the_first(two_nodes: tuple[Node, Node]) -> None:
    near, far = two_nodes
    contents = {add(far, data): data for data in (os.urandom(1 << 18) for _ in range(5))}

    async def main() -> None:
        async with asking(near) as pool:
            for cid, data in contents.items():
                assert not near.has(cids.text(cid))
                with trio.fail_after(PATIENCE):
                    assert (await pool.get(cid)).block == data
                assert near.has(cids.text(cid))

    trio.run(main)


def test_offline_never_makes_the_node_look_on_its_network(two_nodes: tuple[Node, Node]) -> None:
    near, far = two_nodes
    cid, here = add(far, b"elsewhere"), add(near, b"here")

    async def main() -> None:
        async with asking(near, offline=True) as pool:
            with trio.fail_after(PATIENCE):
                assert (await pool.get(here)).block == b"here"
                with pytest.raises(Unavailable):
                    await pool.get(cid)

    trio.run(main)
    assert not near.has(cids.text(cid))


def test_the_other_ends_in_the_middle_of_a_read_and_comes_back(two_nodes: tuple[Node, Node]) -> None:
    near, far = two_nodes
    contents = {add(far, data): data for data in (os.urandom(1 << 16) for _ in range(4))}
    before, during, *after = contents

    async def main() -> None:
        async with asking(near) as pool:
            with trio.fail_after(PATIENCE):
                assert (await pool.get(before)).block == contents[before]
            far.kill()
            with trio.move_on_after(1) as deadline:  # the caller's own, as the cache sets it
                await pool.get(during)
            assert deadline.cancelled_caught
            await trio.to_thread.run_sync(far.start)
            near.connect(far)
            for cid in (during, *after):
                with trio.fail_after(PATIENCE):
                    assert (await pool.get(cid)).block == contents[cid]

    trio.run(main)


def test_the_first_restarted_in_between(two_nodes: tuple[Node, Node]) -> None:
    near, far = two_nodes
    one, two = add(near, b"one"), add(far, b"two")

    async def main() -> None:
        async with asking(near) as pool:
            with trio.fail_after(PATIENCE):
                assert (await pool.get(one)).block == b"one"
                await trio.to_thread.run_sync(near.restart)
                near.connect(far)
                assert (await pool.get(one)).block == b"one"
                assert (await pool.get(two)).block == b"two"

    trio.run(main)
