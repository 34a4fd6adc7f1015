"""Whether a source answers: opened as a mount would, and asked for one block that every IPFS node has."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import IpfsFuseError, NotHere
from ipfsfuse.sources.parse import OpenSettings, Spec, open_source, parse_source

EMPTY_DIRECTORY = cids.parse("bafybeiczsscdsbs7ffqz55asqdf3smv6klcw3gofszvwlyarci47bgf354")
SECONDS = 10.0


def failures(sources: Sequence[str], library: Path, cache_dir: Path) -> Iterator[tuple[str, str | None]]:
    """(SOURCE, why it can't be used or None) for each."""
    for text in sources:
        try:
            spec = parse_source(text)
            trio.run(_probe, spec, OpenSettings(library, cache_dir / "indexes"))
            yield text, None
        except IpfsFuseError as exc:
            yield text, str(exc)
        except trio.TooSlowError:
            yield text, f"no answer within {SECONDS:g} s"


async def _probe(spec: Spec, settings: OpenSettings) -> None:
    source = await trio.to_thread.run_sync(open_source, spec, settings)
    if source is None:
        return
    try:
        with trio.fail_after(SECONDS):
            await source.get(EMPTY_DIRECTORY)
    except NotHere:
        pass  # an answer too
    finally:
        await source.aclose()
