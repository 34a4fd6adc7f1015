"""Our C, loaded where it was compiled: with a package comes one library of it. Concurrency: none of its own."""

import ctypes
import importlib.util
import logging

log = logging.getLogger("ipfsfuse.mount")


def load(name: str, without: str) -> ctypes.CDLL | None:
    """The library `name`, its names in the global scope; None where it is not compiled or can't be used: `without` says what
    that means."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        log.info("%s is not compiled: %s", name, without)
        return None
    try:
        return ctypes.CDLL(found.origin, mode=ctypes.RTLD_GLOBAL)
    except OSError as exc:
        log.info("%s can't be used (%s): %s", name, exc, without)
        return None
