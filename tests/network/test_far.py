"""A mount asks one node for content that only another node has. They are connected over loopback. The other
node ends and comes back."""

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
    """Whether a read gives `content`; False if it times out. Wrong bytes fail the test."""
    try:
        return path.read_bytes() == content or pytest.fail("wrong bytes")
    except OSError as exc:
        assert exc.errno == errno.ETIMEDOUT
        return False


def test_a_tree_that_only_the_other_node_has_is_read_through_the_first(
    two_nodes: tuple[Node, Node], home: Home
) -> None:
    near, far = two_nodes
    tree = write_tree(home.folder, many=50)
    root = far.cmd("add", "-r", "-Q", "--cid-version=1", tree)
    assert not near.has(root)
    with mounted(home, near) as mount:
        same(tree, mount.path / root)


def test_reads_go_on_after_the_other_node_was_killed_and_started_again(
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
        assert time.monotonic() - begun >= 0.9 * DEADLINE, "the block was asked for until the deadline"

        far.start()
        near.connect(far)
        wait_until(lambda: reads(mount.path / other, unread), "the read that failed works again")
        wait_until(lambda: reads(mount.path / large, content), "the read that was cut off works again")
