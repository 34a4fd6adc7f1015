"""pytest fixtures with real Kubo nodes: a plugin for the suite's conftest."""

import os
from collections.abc import Iterator

import pytest

from .node import Node, find_ipfs


def need_kubo() -> None:
    """Skips the test if there is no Kubo program. Fails it instead if IPFSFUSE_REQUIRE_KUBO is 1."""
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
    """A running node for one test, which may stop it and collect its garbage."""
    need_kubo()
    with Node() as node:
        yield node


@pytest.fixture
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two running nodes for one test, connected over loopback."""
    need_kubo()
    with Node() as one, Node() as other:
        one.connect(other)
        yield one, other
