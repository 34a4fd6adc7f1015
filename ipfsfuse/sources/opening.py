"""All SOURCEs of a command, open for the length of a block.

Concurrency: each is opened in a worker thread, one after the other; `OpenSettings.progress` is called from
there.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import Source
from ipfsfuse.sources.local.car_source import CarSource
from ipfsfuse.sources.parse import OpenSettings, open_source, parse_sources

log = logging.getLogger(__name__)


@asynccontextmanager
async def opened(texts: Sequence[str], settings: OpenSettings) -> AsyncIterator[list[Source]]:
    """The sources in their order, without those that an offline mount does not use. Raises UsageError,
    SourceFailed."""
    async with AsyncExitStack() as stack:
        sources: list[Source] = []
        for spec in parse_sources(texts):
            source = await threads.run_sync(open_source, spec, settings)
            if source is None:
                continue
            stack.push_async_callback(source.aclose)
            sources.append(source)
            if isinstance(source, CarSource) and not source.whole:
                log.warning(
                    "%s is damaged or cut short: what stands before the damage is used, the rest is "
                    "not there",
                    source.path,
                )
        yield sources
