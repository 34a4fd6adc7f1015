"""Small files handed to the page cache: never into an inode that someone opens."""

import threading
from collections.abc import Iterator

import pyfuse3
import pytest

from ipfsfuse.fuse import device
from ipfsfuse.fuse.open_files import MAX_WAITING, PageCachePusher
from tests.mounting import wait_until


class Kernel:
    """notify_store, which takes as long as a test says."""

    def __init__(self) -> None:
        self.took: list[tuple[int, int, bytes]] = []
        self.allowed: list[int] = []
        """What may be opened in C from then on."""
        self.began, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()

    def store(self, inode: int, offset: int, content: bytes) -> None:
        self.began.set()
        self.may_go_on.wait(60)
        if content == b"forgotten":
            raise OSError(2, "the kernel does not know it")
        self.took.append((inode, offset, content))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    kernel = Kernel()
    monkeypatch.setattr(pyfuse3, "notify_store", kernel.store)
    monkeypatch.setattr(device, "allow", kernel.allowed.append)
    yield kernel
    kernel.may_go_on.set()


def test_what_is_pushed_is_stored_in_order_and_one_failure_does_not_end_it(kernel: Kernel) -> None:
    pusher = PageCachePusher()
    with pusher.running():
        pusher.push([(7, b"seven"), (8, b"forgotten"), (9, b"nine")])
        wait_until(lambda: len(kernel.took) == 2, "both were stored")
        wait_until(lambda: kernel.allowed == [7, 9], "and may be opened in C")
    assert kernel.took == [(7, 0, b"seven"), (9, 0, b"nine")]


def test_what_is_removed_is_not_stored_and_a_store_under_way_is_waited_for(kernel: Kernel) -> None:
    pusher = PageCachePusher()
    kernel.may_go_on.clear()
    with pusher.running():
        pusher.push([(7, b"seven"), (8, b"eight")])
        assert kernel.began.wait(60)
        pusher.remove(8)
        removed = threading.Event()
        opener = threading.Thread(target=lambda: (pusher.remove(7), removed.set()))
        opener.start()
        assert not removed.wait(0.1), "whoever opens it waits for the store"
        kernel.may_go_on.set()
        assert removed.wait(60)
        assert kernel.took == [(7, 0, b"seven")]
        opener.join()
    assert kernel.took == [(7, 0, b"seven")]


def test_only_so_many_wait_and_the_end_drops_them(kernel: Kernel) -> None:
    pusher = PageCachePusher()
    kernel.may_go_on.clear()
    with pusher.running():
        pusher.push([(1, b"first")])
        assert kernel.began.wait(60)
        pusher.push([(10 + place, b"x") for place in range(MAX_WAITING + 1)])
        assert len(pusher._waiting) == MAX_WAITING
        threading.Timer(0.1, kernel.may_go_on.set).start()
    assert len(kernel.took) <= 2, "the one under way, and one that was taken before the end"
