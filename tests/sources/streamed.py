"""Receives the streams of sources and of the pool."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ipfsfuse.sources.base import Verified
from ipfsfuse.sources.streams import Delivery, Hashed, Stream


async def give_each(stream: Stream[Any], deliver: Callable[..., Awaitable[None]]) -> None:
    """Awaits `deliver` for each item that `stream` sends. A delivery of a range is passed as its fields, and
    then released. Blocks are passed without their digests."""
    async with stream as received:
        async for item in received:
            match item:
                case Delivery(first, blocks, release):
                    await deliver(first, blocks)
                    release()
                case Verified(first, blocks, source, release):
                    await deliver(first, blocks, source)
                    release()
                case Mapping():
                    await deliver(item)
                case _:
                    await deliver(
                        [(cid, sent.block if isinstance(sent, Hashed) else sent) for cid, sent in item]
                    )
