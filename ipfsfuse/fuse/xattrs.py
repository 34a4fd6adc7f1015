"""Extended attributes: `ipfs.cid` as in Kubo's mount, and `ipfsfuse.*` for what is staged of a file."""

import errno
from collections.abc import Callable

import pyfuse3

from ipfsfuse.cache.base import Kept
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid

Values = Callable[[Cid, Kept | None], str]

_NAMES: dict[bytes, Values] = {
    b"ipfs.cid": lambda cid, _kept: cids.text(cid),
    b"ipfsfuse.staged": lambda _cid, kept: str(kept.staged if kept else 0),
    b"ipfsfuse.pinned": lambda _cid, kept: (kept.pinned if kept else "") or "no",
    b"ipfsfuse.source": lambda _cid, kept: kept.source if kept else "",
}


def names() -> list[bytes]:
    return list(_NAMES)


def value(name: bytes, cid: Cid, kept: Callable[[Cid], Kept | None]) -> bytes:
    """The value of `name`. Raises FUSEError: ENODATA for an attribute that is not there, ENOTSUP for namespaces that
    are not kept at all, so that `ls -l` asks for access lists once and not for each file."""
    if name not in _NAMES:
        raise pyfuse3.FUSEError(errno.ENOTSUP if name.startswith((b"system.", b"security.")) else pyfuse3.ENOATTR)
    return _NAMES[name](cid, kept(cid)).encode()
