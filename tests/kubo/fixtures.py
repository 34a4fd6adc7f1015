"""pytest fixtures with real Kubo nodes: a plugin for the suite's conftest."""

import os
from collections.abc import Iterator

import pytest

from .node import Node, find_ipfs


def need_kubo() -> None:
    """Skips the test where there is no node's program, or fails it where one is demanded."""
    if find_ipfs() is None:
        why = "no Kubo: put ipfs on PATH or run tests/kubo/build (needs Go)"
        if os.environ.get("IPFSFUSE_REQUIRE_KUBO") == "1":
            pytest.fail(why)
        pytest.skip(why)


@pytest.fixture(scope="session")
def kubo_node() -> Iterator[Node]:
    """One running node for the whole session."""
    need_kubo()
    with Node() as node:
        yield node


@pytest.fixture
def own_node() -> Iterator[Node]:
    """A running node of this test's own: to stop, to collect garbage in."""
    need_kubo()
    with Node() as node:
        yield node


@pytest.fixture
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two running nodes of this test's own, joined over loopback."""
    need_kubo()
    with Node() as one, Node() as other:
        one.connect(other)
        yield one, other
