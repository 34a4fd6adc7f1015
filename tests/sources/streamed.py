"""Takes what streams of sources and of the pool send."""

from collections.abc import Awaitable, Callable
from typing import Any

from ipfsfuse.sources.base import Verified
from ipfsfuse.sources.streams import Delivery, Stream


async def give_each(stream: Stream[Any], deliver: Callable[..., Awaitable[None]]) -> None:
    """Awaits `deliver` with what is sent: of a range with its fields, but for `release`, which follows."""
    async with stream as received:
        async for item in received:
            match item:
                case Delivery(first, blocks, release):
                    await deliver(first, blocks)
                    release()
                case Verified(first, blocks, source, release):
                    await deliver(first, blocks, source)
                    release()
                case _:
                    await deliver(item)
