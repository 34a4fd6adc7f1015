"""A mount that asks one node for what only another one has, over loopback; the other one ends and comes
back."""

import errno
import random
import time
from pathlib import Path

import pytest

from tests.kubo.node import Node
from tests.mounting import Home, wait_until
from tests.network.nodes import mounted, same, write_tree

DEADLINE = 4
MIB = 1 << 20


def reads(path: Path, content: bytes) -> bool:
    """Whether it reads, and right; False where it is not to be had."""
    try:
        return path.read_bytes() == content or pytest.fail("wrong bytes")
    except OSError as exc:
        assert exc.errno == errno.ETIMEDOUT
        return False


def test_a_tree_that_only_the_other_node_has(two_nodes: tuple[Node, Node], home: Home) -> None:
    near, far = two_nodes
    tree = write_tree(home.folder, many=50)
    root = far.cmd("add", "-r", "-Q", "--cid-version=1", tree)
    assert not near.has(root)
    with mounted(home, near) as mount:
        same(tree, mount.path / root)


def test_the_other_ends_in_the_middle_of_a_read_and_comes_back(
    two_nodes: tuple[Node, Node], home: Home
) -> None:
    near, far = two_nodes
    content, unread = random.Random(1).randbytes(64 * MIB), random.Random(2).randbytes(3 * MIB)
    large, other = (far.add(data, "--cid-version=1", "--chunker=size-1048576") for data in (content, unread))
    with mounted(home, near, options=["--deadline", f"{DEADLINE}s"]) as mount:
        got = b""
        with (mount.path / large).open("rb", buffering=0) as file:
            got += file.read(MIB)
            far.kill()
            try:
                while piece := file.read(MIB):
                    got += piece
            except OSError as exc:
                assert exc.errno == errno.ETIMEDOUT
            else:
                assert len(got) == len(content)
        assert content.startswith(got)

        begun = time.monotonic()
        assert not reads(mount.path / other, unread)
        assert time.monotonic() - begun >= 0.9 * DEADLINE, "it was asked for until the deadline"

        far.start()
        near.connect(far)
        wait_until(lambda: reads(mount.path / other, unread), "what failed reads")
        wait_until(lambda: reads(mount.path / large, content), "what was cut off reads")
