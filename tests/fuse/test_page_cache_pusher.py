"""Small files are pushed into the page cache, but never into an inode that is being opened."""

import threading
from collections.abc import Iterator

import pyfuse3
import pytest

from ipfsfuse.fuse import device
from ipfsfuse.fuse.open_files import MAX_WAITING, PageCachePusher
from tests.mounting import wait_until


class Kernel:
    """A `notify_store` that takes as long as a test wants."""

    def __init__(self) -> None:
        self.stored: list[tuple[int, int, bytes]] = []
        self.allowed: list[int] = []
        """The inodes that may be opened in C."""
        self.began, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()

    def store(self, inode: int, offset: int, content: bytes) -> None:
        self.began.set()
        self.may_go_on.wait(60)
        if content == b"forgotten":
            raise OSError(2, "the kernel does not know it")
        self.stored.append((inode, offset, content))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    kernel = Kernel()
    monkeypatch.setattr(pyfuse3, "notify_store", kernel.store)
    monkeypatch.setattr(device, "allow", kernel.allowed.append)
    yield kernel
    kernel.may_go_on.set()


def test_pushed_files_are_stored_in_order_and_a_failure_does_not_stop_the_others(kernel: Kernel) -> None:
    pusher = PageCachePusher()
    with pusher.running():
        pusher.push([(7, b"seven"), (8, b"forgotten"), (9, b"nine")])
        wait_until(lambda: len(kernel.stored) == 2, "both files were stored")
        wait_until(lambda: kernel.allowed == [7, 9], "both may be opened in C")
    assert kernel.stored == [(7, 0, b"seven"), (9, 0, b"nine")]


def test_a_removed_file_is_not_stored_and_remove_waits_for_a_store_under_way(kernel: Kernel) -> None:
    pusher = PageCachePusher()
    kernel.may_go_on.clear()
    with pusher.running():
        pusher.push([(7, b"seven"), (8, b"eight")])
        assert kernel.began.wait(60)
        pusher.remove(8)
        removed = threading.Event()
        opener = threading.Thread(target=lambda: (pusher.remove(7), removed.set()))
        opener.start()
        assert not removed.wait(0.1), "an open waits for the store"
        kernel.may_go_on.set()
        assert removed.wait(60)
        assert kernel.stored == [(7, 0, b"seven")]
        opener.join()
    assert kernel.stored == [(7, 0, b"seven")]


def test_a_bounded_number_of_files_waits_and_the_end_drops_them(kernel: Kernel) -> None:
    pusher = PageCachePusher()
    kernel.may_go_on.clear()
    with pusher.running():
        pusher.push([(1, b"first")])
        assert kernel.began.wait(60)
        pusher.push([(10 + place, b"x") for place in range(MAX_WAITING + 1)])
        assert len(pusher._waiting) == MAX_WAITING
        threading.Timer(0.1, kernel.may_go_on.set).start()
    assert len(kernel.stored) <= 2, "one was under way, and one was taken before the end"
