"""Whether a source answers: opened as a mount would, and asked for one block that every IPFS node has."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import trio

from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import IpfsFuseError, NotHere
from ipfsfuse.sources.spec import OpenSettings, opened

EMPTY_DIRECTORY = cids.parse("bafybeiczsscdsbs7ffqz55asqdf3smv6klcw3gofszvwlyarci47bgf354")
SECONDS = 10.0


def failures(sources: Sequence[str], library: Path, cache_dir: Path) -> Iterator[tuple[str, str | None]]:
    """(SOURCE, why it can't be used or None) for each."""
    for text in sources:
        try:
            settings = OpenSettings(library, cache_folder.indexes(cache_dir))
            trio.run(_probe, text, settings)
            yield text, None
        except IpfsFuseError as exc:
            yield text, str(exc)
        except trio.TooSlowError:
            yield text, f"no answer within {SECONDS:g} s"


async def _probe(text: str, settings: OpenSettings) -> None:
    async with opened([text], settings) as sources:
        for source in sources:
            with suppress(NotHere), trio.fail_after(SECONDS):  # an answer too
                await source.get(EMPTY_DIRECTORY)
