"""Callers that are cancelled in the middle of a call: a client disconnects, a reader is interrupted, a mount
ends."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from trio.testing import wait_all_tasks_blocked

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.pins.kubo_pins import CLOSING_SECONDS, NodePins
from ipfsfuse.cache.pins.lease import MountId
from ipfsfuse.cache.pins.mfs import NodeRpc
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store import recovery
from ipfsfuse.dag import cid as cids
from tests.cache.pinning import NoCopies
from tests.cache.standin import Chain, make_file, staged, staged_bytes, staged_items
from tests.cache.test_keeping import BUDGET, MIB, directory, fetches, file_node, read_all, tree


async def cancelled_waiting_for(limiter: trio.CapacityLimiter, call: Callable[[], Awaitable[object]]) -> None:
    """Calls `call`, and cancels it while it waits for a thread of `limiter`. Then all threads are freed."""
    others = [object() for _ in range(int(limiter.total_tokens))]
    for other in others:
        await limiter.acquire_on_behalf_of(other)

    async def free_threads() -> None:
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        for other in others:
            limiter.release_on_behalf_of(other)

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            nursery.start_soon(free_threads)
            await call()


def test_after_a_cancelled_eviction_all_bytes_on_disk_are_still_counted(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        file, leaves, _content = make_file(chain, MIB, 1 << 18)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for leaf in leaves:
                await cache.reader.leaf(file, leaf)
            await cancelled_waiting_for(cache.store.io.background, lambda: cache.store.evict(file.cid))
            on_disk = sum(path.stat().st_blocks * 512 for path in staged(tmp_path, "staging"))
            assert on_disk == staged_bytes(cache, file.cid)

    trio.run(main)


def test_entries_for_the_index_are_not_lost_when_a_flush_is_cancelled(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        kept = tree(chain, 1, seed=100)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_all(cache, kept, pin=True)
            cache.names.note(kept, "as-spelled")
            await cancelled_waiting_for(
                trio.to_thread.current_default_thread_limiter(), lambda: recovery.flush(cache.store)
            )
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert (kept, "as-spelled") in list(cache.named_roots())

    trio.run(main)


def test_a_cancelled_unpin_is_done_or_can_be_repeated(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        shared = tree(chain, 1, seed=100)
        other = directory(chain, {"shared": shared})
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_all(cache, shared, pin=True)
            await read_all(cache, other, pin=True)
            await cancelled_waiting_for(
                trio.to_thread.current_default_thread_limiter(), lambda: cache.pinned.unpin(shared)
            )
            if cids.canonical(shared) in [cid for cid, _spelling in cache.named_roots()]:
                await cache.pinned.unpin(shared)
            await cache.pinned.unpin(other)
            assert cache.statistics().pinned == 0
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert cache.statistics().pinned == 0

    trio.run(main)


def test_a_failed_pin_does_not_unpin_what_another_pin_is_pinning(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        shared = file_node(chain, 2 * MIB, seed=100)
        whole = directory(chain, {"shared": shared})
        incomplete = directory(
            chain, {"missing": cids.make(cids.RAW, b"\x12\x20" + bytes(32)), "shared": shared}
        )
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            async with cache.pinned.pin(whole) as pinning:
                await read_all(cache, whole)
                for kept in staged_items(cache):
                    await pinning.file(FileRef(kept.cid, kept.size))
                try:
                    async with cache.pinned.pin(incomplete) as failing:
                        for kept in staged_items(cache):
                            await failing.file(FileRef(kept.cid, kept.size))
                        raise ZeroDivisionError
                except ZeroDivisionError:
                    pass
            await cache.store.evict()
            assert await fetches(cache, chain, whole) == 0

    trio.run(main)


class Silent:
    """A node that never answers."""

    async def call(self, *_arguments: object, **_named: object) -> bytes:
        await trio.sleep_forever()
        raise AssertionError


def test_a_mount_ends_though_its_node_never_answers(tmp_path: Path) -> None:
    async def main() -> None:
        rpc: NodeRpc = Silent()
        async with NodePins.open({"silent": lambda: rpc}, MountId.open(tmp_path), isolated=True) as pins:
            pins.reconcile([Chain().add(b"something")], [], lambda _cid: False, NoCopies())
            await wait_all_tasks_blocked()
            start = trio.current_time()
        assert trio.current_time() - start < 2 * CLOSING_SECONDS + 1

    trio.run(main)
