"""Takes what streams of sources and of the pool send."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ipfsfuse.sources.base import Verified
from ipfsfuse.sources.streams import Delivery, Hashed, Stream


async def give_each(stream: Stream[Any], deliver: Callable[..., Awaitable[None]]) -> None:
    """Awaits `deliver` with what is sent: of a range with its fields, but for `release`, which follows; of
    blocks without their digests."""
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
