"""The one place where blocks from outside are hashed.

Concurrency: small blocks are hashed on the event loop, larger ones in a worker thread.
"""

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import hashes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import WrongBlock

INLINE_BYTES = 64 * 1024
"""A thread costs 115 us there and back, sha2-256 of 64 KiB 37 us; hashlib lets other threads run meanwhile."""


async def check(cid: Cid, block: bytes) -> None:
    """Raises WrongBlock unless `block` is what `cid` names, Unsupported for a hash that is not allowed."""
    if len(block) <= INLINE_BYTES:
        try:
            hashes.verify(cids.multihash(cid), block, "")
        except WrongBlock:
            cids.verify(cid, block)  # names the block, which takes as long as hashing it
        return
    # Left to itself when cancelled: it ends within a millisecond, holds nothing, and its answer is dropped.
    await trio.to_thread.run_sync(cids.verify, cid, block, abandon_on_cancel=True)
