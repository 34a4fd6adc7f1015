"""Parses names and paths: `/ipfs/CID/a/b`, `CID/a/b`, `ipfs://CID/a`.

The result of `parse` needs no further checks. Pure functions.
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NameTooLong, NotACid, UsageError

_IPNS = re.compile("(?i:ipns://)|/+ipns/|ipns/")
MAX_NAME = 255
"""The longest name, in bytes, that a Linux file system holds."""


@dataclass(frozen=True, slots=True)
class IpfsPath:
    """A path below a CID. No name is empty, `.` or `..`, contains `/` or NUL, or is longer than 255 bytes."""

    root: Cid
    names: tuple[bytes, ...] = ()

    def __bytes__(self) -> bytes:
        """`/ipfs/CID/a/b`, with the names as they are stored."""
        return b"/".join((b"/ipfs", cids.text(self.root).encode(), *self.names))

    @property
    def text(self) -> str:
        """The same as text, which `parse` takes; bytes that are not UTF-8 are lone surrogates."""
        return bytes(self).decode("utf-8", "surrogateescape")

    def __str__(self) -> str:
        return "/".join(
            ("/ipfs", cids.text(self.root), *(name.decode("utf-8", "replace") for name in self.names))
        )


def can_hold(name: bytes) -> bool:
    """Whether a file system can have an entry with this name."""
    return 0 < len(name) <= MAX_NAME and name not in (b".", b"..") and b"/" not in name and b"\0" not in name


def parse(text: str) -> IpfsPath:
    """Parses a path from the command line. Repeated slashes and `.` are ignored.

    In a URL, names are percent-encoded. Raises NotACid, NameTooLong, and UsageError for `..`, NUL, a query or
    fragment, and anything that is not a path below a CID.
    """
    rest, quoted = _below_ipfs(text)
    root, _, tail = rest.partition("/")
    if not root:
        raise UsageError(f"{_shown(text)} has no CID: write /ipfs/CID or /ipfs/CID/PATH")
    cid = cids.parse(root)
    if cids.codec(cid) == cids.LIBP2P_KEY:
        raise UsageError(f"{_shown(root)} is the name of a key: write /ipns/{root}")
    return IpfsPath(cid, names(tail, quoted, text))


def split_ipns(text: str) -> tuple[str, tuple[bytes, ...]] | None:
    """The IPNS name of an IPNS path, and the names below it; None for any other text. Raises NameTooLong,
    UsageError for wrong names."""
    found = _IPNS.match(text)
    if found is None:
        return None
    name, _, tail = text[found.end() :].partition("/")
    return name, names(tail, "://" in found.group(), text)


def names(tail: str, quoted: bool = False, whole: str = "") -> tuple[bytes, ...]:
    """The names in `tail`, a path below a root. Messages show `whole`. Raises NameTooLong, UsageError."""
    return tuple(_name(part, quoted, whole or tail) for part in tail.split("/") if part not in ("", "."))


def cid_alone(text: str) -> Cid:
    """The CID in `text`: CID, /ipfs/CID or ipfs://CID. Raises UsageError, also for a path below a CID."""
    try:
        found = parse(text)
    except NotACid as exc:
        raise UsageError(str(exc) if text in str(exc) else f"{text!r} is not a CID: {exc}") from exc
    if found.names:
        raise UsageError(f"{text!r} is not a CID: a path below one can't be given here")
    return found.root


def _below_ipfs(text: str) -> tuple[str, bool]:
    """The text after `/ipfs/` or `ipfs://`, and whether it is percent-encoded."""
    _refuse_ipns(text)
    scheme, colon, rest = text.partition("://")
    if colon and "/" not in scheme:
        if scheme.lower() != "ipfs":
            raise UsageError(f"{_shown(text)}: only ipfs:// is read here; write /ipfs/CID/PATH")
        if "?" in rest or "#" in rest:
            raise UsageError(
                f"{_shown(text)}: a query or fragment is not part of a path; write %3F or %23 where a "
                "name has ? or #"
            )
        return rest, True
    if not text.startswith("/"):
        return text, False
    top, _, rest = text.lstrip("/").partition("/")
    if top != "ipfs":
        raise UsageError(f"{_shown(text)}: not a path below /ipfs")
    return rest.lstrip("/"), False


def _refuse_ipns(text: str) -> None:
    """Raises UsageError for an IPNS name or path, in either spelling."""
    found = _IPNS.match(text)
    if found is not None:
        name = _shown(text[found.end() :])
        raise UsageError(
            f"{_shown(text)}: IPNS names are not resolved here; ask `ipfs resolve -r /ipns/...` for "
            f"the CID of {name}"
        )


def _name(part: str, quoted: bool, text: str) -> bytes:
    name = part.encode("utf-8", "surrogateescape" if not quoted else "surrogatepass")
    if quoted:
        name = unquote_to_bytes(name)
    if len(name) > MAX_NAME:
        raise NameTooLong(f"{_shown(text)}: a name of {len(name)} bytes; {MAX_NAME} is the most")
    if not can_hold(name):
        raise UsageError(f"{_shown(text)}: {_shown(part)} is not the name of an entry")
    return name


def _shown(text: str) -> str:
    """One short line, whatever the text holds."""
    return repr(text if len(text) <= 200 else text[:200] + "...")
