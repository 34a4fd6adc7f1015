"""Small files handed to the page cache: never into an inode that someone opens."""

import threading
from collections.abc import Iterator

import pyfuse3
import pytest

from ipfsfuse.fuse.pages import MAX_WAITING, Pages
from tests.mounting import wait_until


class Kernel:
    """notify_store, which takes as long as a test says."""

    def __init__(self) -> None:
        self.took: list[tuple[int, int, bytes]] = []
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
    yield kernel
    kernel.may_go_on.set()


def test_what_is_given_is_stored_in_order_and_one_failure_is_no_end(kernel: Kernel) -> None:
    pages = Pages()
    with pages.running():
        pages.give([(7, b"seven"), (8, b"forgotten"), (9, b"nine")])
        wait_until(lambda: len(kernel.took) == 2, "both were stored")
        assert not any(pages.pending(inode) for inode in (7, 8, 9))
    assert kernel.took == [(7, 0, b"seven"), (9, 0, b"nine")]


def test_what_is_withdrawn_is_not_stored_and_a_store_under_way_is_waited_for(kernel: Kernel) -> None:
    pages = Pages()
    kernel.may_go_on.clear()
    with pages.running():
        pages.give([(7, b"seven"), (8, b"eight")])
        assert kernel.began.wait(60)
        assert pages.pending(7)
        assert pages.pending(8)
        pages.withdraw(8)
        assert not pages.pending(8)
        withdrawn = threading.Event()
        opener = threading.Thread(target=lambda: (pages.withdraw(7), withdrawn.set()))
        opener.start()
        assert not withdrawn.wait(0.1), "whoever opens it waits for the store"
        kernel.may_go_on.set()
        assert withdrawn.wait(60)
        assert kernel.took == [(7, 0, b"seven")]
        opener.join()
    assert kernel.took == [(7, 0, b"seven")]


def test_only_so_many_wait_and_the_end_drops_them(kernel: Kernel) -> None:
    pages = Pages()
    kernel.may_go_on.clear()
    with pages.running():
        pages.give([(1, b"first")])
        assert kernel.began.wait(60)
        pages.give([(10 + place, b"x") for place in range(MAX_WAITING + 1)])
        assert pages.pending(10 + MAX_WAITING - 1)
        assert not pages.pending(10 + MAX_WAITING)
        threading.Timer(0.1, kernel.may_go_on.set).start()
    assert len(kernel.took) <= 2, "the one under way, and one that was taken before the end"
