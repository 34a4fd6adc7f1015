"""The one place where blocks from outside are hashed.

Concurrency: small blocks are hashed on the event loop, larger ones in a worker thread.
"""

from collections.abc import Sequence

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import WrongBlock
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import Block

INLINE_BYTES = 64 * 1024
"""A thread costs 115 us there and back, sha2-256 of 64 KiB 37 us; hashlib lets other threads run
meanwhile."""


async def check(cid: Cid, block: bytes) -> None:
    """Raises WrongBlock unless `block` is what `cid` names, Unsupported for a hash that is not allowed."""
    if len(block) <= INLINE_BYTES:
        try:
            multihashes.verify(cids.multihash(cid), block, "")
        except WrongBlock:
            cids.verify(cid, block)  # names the block, which takes as long as hashing it
        return
    # Left to itself when cancelled: it ends within a millisecond, holds nothing, and its answer is dropped.
    await threads.run_sync(cids.verify, cid, block, abandon_on_cancel=True)


async def check_each(wanted: Sequence[Cid], blocks: Sequence[Block]) -> Sequence[bool]:
    """Of each of `blocks` whether it is what `wanted` names. Raises Unsupported as `check`."""

    def run() -> Sequence[bool]:
        return [
            multihashes.matches(cids.multihash(cid), (block,))
            for cid, block in zip(wanted, blocks, strict=True)
        ]

    if sum(map(len, blocks)) <= INLINE_BYTES:
        return run()
    return await threads.run_sync(run, abandon_on_cancel=True)  # as in `check`
