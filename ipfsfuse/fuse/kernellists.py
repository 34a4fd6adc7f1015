"""Lets the kernel keep listings: a directory that a CID fixes is listed to it once, and by it from then on.

pyfuse3 can't set FOPEN_CACHE_DIR; `kept_listings.c` sets it for the handles marked here. Measured with 10,000 names: again in
6 ms instead of 53. Where that was not compiled, listings are given anew each time. Concurrency: none.
"""

import ctypes
import importlib.util
import logging

log = logging.getLogger("ipfsfuse.mount")

_KEPT = 1 << 62
"""As in the C file."""


def _load() -> bool:
    found = importlib.util.find_spec("ipfsfuse.fuse._kept_listings")
    if found is None or found.origin is None:
        log.info("the part that lets the kernel keep listings is not compiled: each listing asks again")
        return False
    try:
        ctypes.CDLL(found.origin, mode=ctypes.RTLD_GLOBAL)
    except OSError as exc:
        log.info("the kernel can't be told to keep listings (%s): each listing asks again", exc)
        return False
    return True


LOADED = _load()
"""Must come before pyfuse3 is imported: its calls go to what is loaded first."""


def kept(handle: int) -> int:
    """`handle`, marked: what is listed through it the kernel keeps."""
    return handle | _KEPT if LOADED else handle
