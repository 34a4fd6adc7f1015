"""Our C, in front of libfuse's own calls: what pyfuse3 does not offer (`kept_listings.c`) or can't do fast enough (`porter.c`).

It must be loaded before pyfuse3 is imported: calls go to what is loaded first. Without it everything works, with more
requests. Concurrency: none of its own.
"""

import ctypes
import importlib.util
import logging

log = logging.getLogger("ipfsfuse.mount")


def _load() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("ipfsfuse.fuse._native")
    if found is None or found.origin is None:
        log.info("the C part is not compiled: listings are asked for each time, and each open of a small file")
        return None
    try:
        return ctypes.CDLL(found.origin, mode=ctypes.RTLD_GLOBAL)
    except OSError as exc:
        log.info("the C part can't be used (%s): listings are asked for each time, and each open of a small file", exc)
        return None


LIBRARY = _load()
