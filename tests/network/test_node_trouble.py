"""The node collects garbage, restarts, dies and hangs. Cached content is served all the time."""

import random
import threading

from tests.faults.gateway import errno_of
from tests.kubo.node import Node
from tests.mounting import PATIENCE, Home
from tests.network.nodes import again_and_again, drop_pages, mounted, same, write_tree


def wait_for_a_full_read(done: threading.Event) -> None:
    """Waits until everything was read once more from beginning to end."""
    for _ in range(2):
        done.clear()
        assert done.wait(PATIENCE)


def test_cached_content_is_served_whatever_the_node_does(own_node: Node, home: Home) -> None:
    node = own_node
    tree = write_tree(home.folder, many=30)
    large = random.Random(3).randbytes(9 << 20)
    (tree / "large").write_bytes(large)
    root = node.cmd("add", "-r", "-Q", "--cid-version=1", "--pin=false", tree)
    with mounted(home, node, options=["--pins", "none", "--deadline", "5s"]) as mount:
        there = mount.path / root

        def read_all() -> None:
            for path in there.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    drop_pages(path)
            same(tree, there)

        read_all()
        with again_and_again(read_all) as done:
            node.gc()
            assert not node.has(root), "the node has collected it"
            wait_for_a_full_read(done)
            node.restart()
            wait_for_a_full_read(done)
            node.kill()
            wait_for_a_full_read(done)
            node.start()
            node.pause()
            wait_for_a_full_read(done)
            node.resume()
        assert (
            errno_of(
                mount.path / node.cmd("add", "-Q", "--only-hash", "--cid-version=1", stdin=b"never there")
            )
            == "ETIMEDOUT"
        )
        new = node.add(b"added since", "--cid-version=1")
        assert (mount.path / new).read_bytes() == b"added since"


def test_reads_go_on_after_the_node_was_restarted_between_them(own_node: Node, home: Home) -> None:
    contents = {
        own_node.add(data, "--cid-version=1"): data
        for data in (random.Random(n).randbytes(600_000) for n in range(6))
    }
    with mounted(home, own_node) as mount:
        for number, (cid, content) in enumerate(contents.items()):
            assert (mount.path / cid).read_bytes() == content
            own_node.stop() if number % 2 else own_node.kill()
            own_node.start()
