"""Extended attributes: `ipfs.cid` as in Kubo's mount, and `ipfsfuse.*` for what is staged of a file."""

import errno
from collections.abc import Callable

import pyfuse3

from ipfsfuse.cache.base import Kept
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid

Find = Callable[[Cid], Kept | None]

_NAMES: dict[bytes, Callable[[Cid, Find], str]] = {
    b"ipfs.cid": lambda cid, _find: cids.text(cid),
    b"ipfsfuse.staged": lambda cid, find: str(kept.staged if (kept := find(cid)) else 0),
    b"ipfsfuse.pinned": lambda cid, find: (kept.pinned if (kept := find(cid)) else "") or "no",
    b"ipfsfuse.source": lambda cid, find: kept.source if (kept := find(cid)) else "",
}


def names() -> list[bytes]:
    return list(_NAMES)


def value(name: bytes, cid: Cid, find: Find) -> bytes:
    """The value of `name`. Raises FUSEError: ENODATA for an attribute that is not there (the mount's root,
    whose CID is empty, has none), ENOTSUP for namespaces that are not kept at all, so that `ls -l` asks for
    access lists once and not for each file."""
    if not cid or name not in _NAMES:
        raise pyfuse3.FUSEError(
            errno.ENOTSUP if name.startswith((b"system.", b"security.")) else pyfuse3.ENOATTR
        )
    return _NAMES[name](cid, find).encode()
