"""Many CIDs as arguments: each a CID, /ipfs/CID or ipfs://CID, or a file that lists some. Raises UsageError."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.path import cid_alone
from ipfsfuse.errors import UsageError


def many(texts: Iterable[str], option: str) -> frozenset[Cid]:
    """The canonical CIDs of `texts`, each a CID or a file that lists some, one a line, # before comments."""
    return frozenset(cids.canonical(each) for text in texts for each in _listed(text, option))


def _listed(text: str, option: str) -> Iterator[Cid]:
    try:
        yield cid_alone(text)
        return
    except UsageError as exc:
        if not Path(text).is_file():
            raise UsageError(f"{option} {text!r} is neither a CID nor a file that lists some") from exc
    try:
        lines = Path(text).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{option} {text}: can't be read: {exc}") from exc
    for number, line in enumerate(lines, 1):
        if entry := line.partition("#")[0].strip():
            try:
                yield cid_alone(entry)
            except UsageError as exc:
                raise UsageError(f"{option} {text}, line {number}: {exc}") from exc
