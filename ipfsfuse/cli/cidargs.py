"""CIDs as arguments: a CID, /ipfs/CID or ipfs://CID; lists of them from files. Raises UsageError."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid, UsageError


def one(text: str) -> Cid:
    bare = text.removeprefix("ipfs://") if text.startswith("ipfs://") else text.removeprefix("/ipfs/")
    try:
        return cids.parse(bare.rstrip("/"))
    except NotACid as exc:
        if "/" in bare.strip("/"):
            raise UsageError(f"{text!r} is not a CID: a path below one can't be given here") from exc
        raise UsageError(str(exc) if text in str(exc) else f"{text!r} is not a CID: {exc}") from exc


def many(texts: Iterable[str], option: str) -> frozenset[Cid]:
    """The canonical CIDs of `texts`, each a CID or a file that lists some, one a line, # before comments."""
    return frozenset(cids.canonical(each) for text in texts for each in _listed(text, option))


def _listed(text: str, option: str) -> Iterator[Cid]:
    try:
        yield one(text)
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
                yield one(entry)
            except UsageError as exc:
                raise UsageError(f"{option} {text}, line {number}: {exc}") from exc
